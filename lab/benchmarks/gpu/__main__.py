"""``python -m lab.benchmarks.gpu``: the report of ``make gpu-check``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from lab.benchmarks.gpu.detector import QUICK_SETTINGS, SETTINGS, measure_ddp, measure_settings
from lab.benchmarks.gpu.device_report import is_sound, write_report
from lab.benchmarks.gpu.operation import Row, measure_cases
from lab.benchmarks.machine import describe_machine, machine_line

HELP = """
Check the CUDA path of this machine's first GPU and measure it beside others, in under 10 minutes:
the tests for CUDA; the operation and the block; everyone's softmax; Mask R-CNN with and without a
block; the quick study. It needs PyTorch alone: what else is missing is named in the report with
what it would have shown. Each section has its share of the time; what does not fit is named, too.

Wheels in build/wheels (see docs/GPU.md) are used for what is not installed.
"""
ROOT = Path(__file__).resolve().parents[3]
WHEELS = ROOT / "build" / "wheels"
# Sections and their shares of the time. What one does not need is the next ones'.
SECTIONS = {"tests": 90, "block": 150, "softmax": 110, "detector": 130, "ddp": 30, "study": 90}
TESTS = ("layers/test_cuda.py", "layers/test_half_precision.py", "lab/test_memory.py")
# Of its time, what a section may take longer than it plans to, before it is stopped.
_GRACE = 15.0
# A study of two iterations, for a try.
_QUICK_STUDY = ("--settings", "baseline", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0")


class Place(NamedTuple):
    """Where a section runs: its files are in ``scratch``."""

    device: torch.device
    quick: bool
    scratch: Path
    environment: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a test failed, or if something of ours could not be measured."""
    args = parse_arguments(arguments)
    if args.section:
        return _measure_section(args)
    begin, rows = time.monotonic(), []
    machine = describe_machine(args.device, torch.get_num_threads())
    print(machine_line(machine), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", machine["name"]).strip("-")
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(args.device, args.quick, Path(scratch), _environment(Path(scratch)))
        for number, section in enumerate(args.sections):
            left = 60 * args.minutes - (time.monotonic() - begin)
            shares = [SECTIONS[later] for later in args.sections[number:]]
            seconds = max(0.0, left * shares[0] / sum(shares))
            print(f"{section}: up to {seconds:.0f} s", flush=True)
            start = time.monotonic()
            found = _run_section(section, place, seconds)
            took = {"kind": "time", "seconds": time.monotonic() - start}
            rows += [{"section": section, **row} for row in (*found, took)]
            # After each section: whatever stops the next one, this is kept.
            report = write_report(args.output, name, machine, rows)
    print(report)
    return 0 if is_sound(rows) else 1


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Errors of the user end the process."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmarks.gpu",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "docs" / "gpu", metavar="DIR", help="docs/gpu")
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="all by default")
    add("--minutes", type=float, default=9.5, help="for all of it (default: %(default)g)")
    add("--device", type=torch.device, default="cuda", help="cpu is for trying the check itself")
    add("--quick", action="store_true", help="tiny sizes, for trying the check itself")
    for internal in ("--section", "--rows", "--seconds"):
        add(internal, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here")
    return args


def _environment(scratch: Path) -> dict[str, str]:
    """This process's, with what lies in ``WHEELS`` and is not installed on the path."""
    for wheel in sorted(WHEELS.glob("*.whl")):
        try:
            importlib.metadata.distribution(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            zipfile.ZipFile(wheel).extractall(scratch / "wheels")
    path = [str(ROOT), str(scratch / "wheels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _run_section(section: str, place: Place, seconds: float) -> list[Row]:
    """The rows of a section, which runs in processes of its own."""
    if section == "tests":
        return _run_tests(place, seconds)
    if section == "study":
        return _run_study(place, seconds)
    rows = place.scratch / f"{section}.rows"
    rows.touch()
    launcher = []
    if section == "ddp":
        processes = torch.cuda.device_count() if place.device.type == "cuda" else 2
        if processes < 2:
            return [_left_out("training on several GPUs", "there is only one")]
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    options = [f"--device={place.device}", *["--quick"] * place.quick, f"--seconds={seconds}"]
    module = [*launcher, "lab.benchmarks.gpu", f"--section={section}", f"--rows={rows}"]
    problem = _run(["-m", *module, *options], section, place, seconds)
    return _with_problem(list(map(json.loads, rows.read_text("utf-8").splitlines())), problem)


def _run_tests(place: Place, seconds: float) -> list[Row]:
    file, tests = place.scratch / "tests.xml", [f"tests/{name}" for name in TESTS]
    chosen = "cuda" if place.device.type == "cuda" else "cpu and dense"
    command = ["-m", "pytest", *tests, "-q", "-k", chosen, f"--junitxml={file}"]
    problem = _run([*command, "-p", "no:cacheprovider"], "tests", place, seconds)
    if not file.exists():
        return _with_problem([], problem)
    suite = next(ElementTree.parse(file).iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('name')}: {(fault.get('message') or '').splitlines()[:1]}"
        for case in suite.iter("testcase")
        for fault in (*case.iter("failure"), *case.iter("error"))
    ]
    return [{"kind": "tests", **counts, "failed": failed}]


def _run_study(place: Place, seconds: float) -> list[Row]:
    """Of the runs that finish in time, the APs."""
    output = place.scratch / "study"
    command = ["tools/study.py", "lab/studies/quick.yaml", "--output", str(output), "--workers=5"]
    problem = _run([*command, *(_QUICK_STUDY * place.quick)], "study", place, seconds)
    found: list[Row] = []
    for file in sorted(output.rglob("result.json")):
        name = str(file.parent.relative_to(output))
        found.append({"kind": "study", "run": name, **json.loads(file.read_text())})
    return _with_problem(found, problem)


def _with_problem(found: list[Row], problem: str) -> list[Row]:
    what = "the rest of it" if found else "all of it"
    return [*found, _left_out(what, problem)] if problem else found


def _left_out(what: str, why: str) -> Row:
    return {"kind": "left out", "what": what, "why": why}


def _run(command: Sequence[str], name: str, place: Place, seconds: float) -> str:
    """Run Python with these arguments; what went wrong, in a line."""
    log = place.scratch / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=place.environment,
            stdout=file,
            stderr=file,
            start_new_session=True,  # its own group, so that its children stop with it
        )
        try:
            status = process.wait(seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds + _GRACE:.0f} s"
        finally:
            _stop(process)
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit status {status}: {lines[-1] if lines else ''}" if status else ""


def _stop(process: subprocess.Popen[Any]) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sent)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue


def _measure_section(args: argparse.Namespace) -> int:
    """A section, in its own process: a line of JSON for each row, as soon as it is there."""
    deadline = time.monotonic() + float(args.seconds)
    if args.section == "ddp":
        rows = measure_ddp(args.device, args.quick)
    elif args.section == "detector":
        settings = QUICK_SETTINGS if args.quick else SETTINGS
        rows = measure_settings(settings, args.device, args.quick, deadline)
    else:
        rows = measure_cases(args.section, args.device, args.quick, deadline)
    with Path(args.rows).open("a", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(row), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
