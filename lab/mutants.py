"""
Plant faults in the package, one at a time, and see whether the tests notice.

    $ python -m lab.mutants                          # 150 faults, over all rooms
    $ python -m lab.mutants --sample 20 --room layers

A room is a folder of the package, or `config`, or the other modules beside it. The sample depends
on what a function contains, not on where it is: a change elsewhere leaves it as it is. It works on
a copy. Each fault gets a process of its own, forked from one that has imported PyTorch and
Detectron2 already. A fault that no test can notice stands in `mutants.yaml`, with the reason.

The status is 1 if the tests catch less in a room than `GOALS` says.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nl_detectron"
EQUIVALENT = Path(__file__).with_suffix(".yaml")
GOALS = dict.fromkeys(["config", "data", "layers", "modeling", "weights"], 0.95)
GOAL = 0.90  # of the other rooms
FILES = 12  # of tests at most, for a fault
SECONDS_TO_END = 10
# What a test would import; the package itself is imported in each process.
IMPORTED = ["detectron2.data", "detectron2.engine", "detectron2.evaluation", "detectron2.model_zoo"]
IMPORTED += ["torch", "torchvision", "matplotlib.pyplot"]

OTHER: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult},
}


@dataclass(frozen=True)
class Fault:
    """A part of a module, and the text that takes its place."""

    module: str  # its path below the package
    name: str  # what stands in mutants.yaml; no line, which changes with what is above
    line: int
    source: str  # of the module, with the fault

    @property
    def room(self) -> str:
        """What part of the package it is in."""
        folder, _, _ = self.module.rpartition("/")
        return folder.partition("/")[0] or ("config" if self.module == "config.py" else "others")

    @property
    def rank(self) -> str:
        """Its place in the order in which faults are taken."""
        return hashlib.sha256(self.name.encode()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a room is below its goal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=150, help="how many faults")
    parser.add_argument("--room", help="plant faults in this part of the package alone")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--seconds", type=float, default=120, help="the limit of a test")
    args = parser.parse_args(arguments)
    every = [fault for file in modules(args.root) for fault in faults(args.root, file)]
    rooms = sorted({fault.room for fault in every})
    if args.room and args.room not in rooms:
        parser.error(f"--room {args.room}: it should be one of {', '.join(rooms)}")
    reasons = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or {}
    chosen = sample([f for f in every if args.room in (None, f.room)], args.sample)
    for name in IMPORTED:
        importlib.import_module(name)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    unsound: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "copy")
        copy_tree(args.root, work)
        for number, fault in enumerate(chosen):
            start = time.monotonic()
            result, why = "equivalent", reasons.get(fault.name, "")
            if not why:
                result, why = outcome(fault, work, args.seconds, unsound)
            counts[fault.room][result] += 1
            seconds = time.monotonic() - start
            print(f"{number + 1:3} {result:10} {fault.name} (line {fault.line}), {seconds:.0f} s")
            print(f"    {why}", flush=True)
    print(table(counts))
    return int(any(caught(c) < GOALS.get(room, GOAL) for room, c in counts.items()))


def modules(root: Path) -> list[Path]:
    """The package's files, in order."""
    return sorted((root / PACKAGE).rglob("*.py"))


def sample(every: list[Fault], count: int) -> list[Fault]:
    """As many faults of each room, as far as they go."""
    places: Counter[str] = Counter()
    order = []
    for fault in sorted(every, key=lambda fault: fault.rank):
        order.append((places[fault.room], fault.room, fault))
        places[fault.room] += 1
    chosen = sorted(order, key=lambda item: item[:2])[:count]
    return [fault for _, _, fault in sorted(chosen, key=lambda item: (item[1], item[0]))]


def faults(root: Path, file: Path) -> Iterator[Fault]:
    """All the faults that can be planted in a file's functions."""
    source = file.read_text(encoding="utf-8")
    module = file.relative_to(root / PACKAGE).as_posix()
    seen: Counter[str] = Counter()
    lines = source.encode().splitlines(keepends=True)

    def place(line: int, column: int) -> int:
        return sum(map(len, lines[: line - 1])) + column

    for scope, node in inside(ast.parse(source), ""):
        for new in changed(node):
            before, after = (ast.unparse(n).split("\n")[0] for n in (node, new))
            name = f"{module} {scope}: {before} -> {after}"
            seen[name] += 1
            text = ast.unparse(new)
            if isinstance(new, ast.expr) and not isinstance(new, ast.Constant):
                text = f"({text})"
            start = place(node.lineno, node.col_offset)
            end = place(node.end_lineno or 0, node.end_col_offset or 0)
            data = source.encode()
            planted = (data[:start] + text.encode() + data[end:]).decode()
            number = f" #{seen[name]}" if seen[name] > 1 else ""
            yield Fault(module, name + number, node.lineno, planted)


def inside(node: ast.AST, scope: str) -> Iterator[tuple[str, ast.stmt | ast.expr]]:
    """Each statement and expression in a function, with the function's name."""
    for field, value in ast.iter_fields(node):
        # Messages and annotations are no part of what is computed.
        if field in ("annotation", "returns", "exc", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, (ast.JoinedStr, ast.Assert)) or not isinstance(child, ast.AST):
                continue
            inner = scope
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{scope}.{child.name}".lstrip(".")
            elif scope and isinstance(child, (ast.stmt, ast.expr)):
                yield scope, child
            yield from inside(child, inner)


def changed(node: ast.stmt | ast.expr) -> Iterator[ast.stmt | ast.expr]:
    """The node with one fault, for each that is usual in it."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op]) if type(op) in OTHER:
            new.ops = [OTHER[type(op)]()]  # type: ignore[list-item]
            yield new
        case ast.BinOp() | ast.BoolOp() if type(new.op) in OTHER:
            new.op = OTHER[type(new.op)]()  # type: ignore[assignment]
            yield new
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield new.operand
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.IfExp():
            yield ast.IfExp(ast.UnaryOp(ast.Not(), new.test), new.body, new.orelse)
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield ast.Pass()
        case ast.Continue() | ast.Break():
            yield ast.Break() if isinstance(new, ast.Continue) else ast.Continue()
        case ast.Call(keywords=[*_, ast.keyword(arg=str())]):
            new.keywords.pop()
            yield new


def nearest(module: str, root: Path) -> list[str]:
    """The test files for a module: of its name, of its folder, and what names its contents."""
    path = Path(module)
    names = re.findall(r"^(?:def|class) ([A-Za-z]\w+)", (root / PACKAGE / path).read_text(), re.M)
    word = re.compile(rf"\b(?:{'|'.join([*names, re.escape(path.stem)])})\b")
    near = [folder for folder in [path.parent, *path.parent.parents] if folder != Path()]
    ranks = {}
    for file in sorted((root / "tests").rglob("test_*.py")):
        inside_of = file.relative_to(root / "tests").parent
        mentions = bool(word.search(file.read_text(encoding="utf-8")))
        if not (mentions or inside_of in near or file.stem == f"test_{path.stem}"):
            continue
        of_name = file.stem == f"test_{path.stem}"
        ranks[file.relative_to(root).as_posix()] = (
            not (of_name and inside_of == path.parent),
            inside_of not in [path.parent, *near],
            not mentions,
        )
    return sorted(ranks, key=lambda file: ranks[file])[:FILES]


class Recorder:
    """Writes down each test as it begins, and the first that fails."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A sign of life."""
        self.log.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """The name of what fails."""
        if report.failed:
            self.log.write_text(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def outcome(fault: Fault, work: Path, seconds: float, unsound: set[str]) -> tuple[str, str]:
    """What the tests in a copy make of a fault, and which of them."""
    file = work / PACKAGE / fault.module
    source = file.read_text(encoding="utf-8")
    files = nearest(fault.module, work)
    while True:
        left_out = [f"--deselect={name}" for name in sorted(unsound)]
        file.write_text(fault.source, encoding="utf-8")
        try:
            status, test = run_tests(work, [*files, *left_out], seconds)
        finally:
            file.write_text(source, encoding="utf-8")
        if status is None:
            return "hung", f"no test ended within {seconds:.0f} s"
        if not test:
            return ("survived", " ".join(files)) if not status else ("caught", f"status {status}")
        # A test counts if it passes without the fault.
        words = [test] if "::" in test else [test, "--collect-only"]
        if run_tests(work, words, seconds)[0] == 0:
            return "caught", test
        unsound.add(test)
        print(f"    fails without a fault, left out from here on: {test}", flush=True)


def run_tests(work: Path, words: list[str], seconds: float) -> tuple[int | None, str]:
    """
    Run pytest in a process of its own.

    Returns:
        The status, None if no test ended for so many seconds; and the first test that failed.
    """
    log = work.parent / "failed.txt"
    log.write_text("")
    if (pid := os.fork()) == 0:
        try:
            os.setsid()
            os._exit(_run_tests(work, words, log))
        finally:
            os._exit(1)
    status = None
    while status is None and time.time() - log.stat().st_mtime < seconds:
        status = _wait(pid, 0.5)
    if status is None:
        os.kill(pid, signal.SIGINT)  # first, let the test end what it started
        _wait(pid, SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status, log.read_text()


def _wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def _run_tests(work: Path, words: list[str], log: Path) -> int:
    output = os.open(log.with_name("output.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(work)
    # Its code is that of the copy, and no bytecode of the sound module is taken for the fault's.
    for name in [n for n in sys.modules if n.partition(".")[0] in (PACKAGE, "lab")]:
        del sys.modules[name]
    sys.path[:] = [str(work), *(p for p in sys.path if p and Path(p) != ROOT)]
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(work), TMPDIR=str(log.parent))
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={log.with_name('temporary')}"]
    for kind in ("not slow", "slow"):
        status = pytest.main([*options, "-m", kind, *words], plugins=[Recorder(log)])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return int(status)
    return 0


def copy_tree(root: Path, work: Path) -> None:
    """Copy what git tracks or would, without what it ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, work / name)


def caught(counts: Counter[str]) -> float:
    """What share of the faults that are none by equivalence was caught."""
    noticed = counts["caught"] + counts["hung"]
    return noticed / max(noticed + counts["survived"], 1)


def table(counts: dict[str, Counter[str]]) -> str:
    """The outcomes by room."""
    kinds = ["caught", "hung", "survived", "equivalent"]
    rows = [
        [
            room,
            *(count[kind] for kind in kinds),
            f"{caught(count):.0%}",
            f"{GOALS.get(room, GOAL):.0%}",
        ]
        for room, count in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]
    ]
    return tabulate(rows, ["room", *kinds, "share caught", "goal"], tablefmt="pipe")


if __name__ == "__main__":
    sys.exit(main())
