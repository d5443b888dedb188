"""
Command lines in forks of one process that has imported PyTorch and Detectron2, which takes seconds.

A test of a command calls ``run``, as it would ``subprocess.run`` with ``sys.executable``::

    done = run(ROOT / "train_net.py", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    run("-m", "nl_detectron"), run("-c", "import nl_detectron")

Nothing of ours has been imported before: ``sys.argv``, ``sys.path``, ``__main__``, folder and
environment are as if Python had been given the script, and it ends as Python ends. Only what Python
or Detectron2 does before the script (Python's options, warnings of imports) needs a process of its
own: ``start_python``. To watch a command or send it signals: ``shared_commands().start``.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # far more than any takes, on a machine that does nothing else
IMPORTED = [
    *("torch", "torchvision", "cv2", "matplotlib", "pycocotools.cocoeval", "yaml"),
    *(f"detectron2.{name}" for name in ("config", "data", "engine", "evaluation", "export")),
    *(f"detectron2.{name}" for name in ("model_zoo", "modeling", "utils.visualizer")),
]


def error_of(capsys: Any, main: Any, *words: Any) -> str:
    """The one line on stderr of a command that ends with an error of the user."""
    import pytest  # no part of the commands

    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def run(
    *words: Any,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = SECONDS,
) -> subprocess.CompletedProcess[str]:
    """
    Run a command to its end.

    Args:
        *words: a script, "-m" and a module, or "-c" and code; then its arguments.
        cwd: the working folder, this one by default.
        environment: variables that it has besides those of the test; PYTHONPATH is the repository,
            if it is not among them.

    Raises:
        AssertionError: it, or a process that it started, has not ended by then; with the stacks.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        command = shared_commands().start(
            output, *words, errors=errors, cwd=cwd, **(environment or {})
        )
        status = command.wait(seconds)
        return subprocess.CompletedProcess(words, status, output.read_text(), errors.read_text())


def start_python(*words: Any, seconds: float = SECONDS, **options: Any) -> Any:
    """``subprocess.run`` of a Python of its own, whose output is kept."""
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, **options}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, **options)


@functools.cache
def shared_commands() -> Commands:
    """Those of this process, which imports once; closed when it ends."""
    commands = Commands()
    atexit.register(commands.close)
    return commands


class Commands:
    """Starts command lines, and waits for their ends."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._started: set[int] = set()
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End all that was started."""
        for process in self._started:  # a test may have failed before it ended
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        self._server.kill()
        self._server.communicate(timeout=SECONDS)

    def start(
        self,
        output: Path,
        *words: Any,
        errors: Path | None = None,
        cwd: Path | None = None,
        **environment: Any,
    ) -> Command:
        """
        Args:
            output: a file; what is printed is added to it.
            *words: see `run`.
            errors: the file for stderr, if it is another.
            **environment: variables to add.
        """
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        request = {
            "output": str(output),
            "errors": str(errors or output),
            "cwd": str(cwd or Path.cwd()),
            "words": list(map(str, words)),
            "environment": {name: str(value) for name, value in variables.items()},
        }
        process = self._ask(request)
        self._started.add(process)
        return Command(process, errors or output, self)

    def status_of(self, process: int, seconds: float) -> int | None:
        """The exit status; None if it has not ended by then."""
        deadline = time.monotonic() + seconds
        while (status := self._ask({"process": process})) is None:
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)
        return status

    def forget(self, process: int) -> None:
        """Its whole group has ended, and its number may become another's."""
        self._started.discard(process)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


@dataclass
class Command:
    """A process, which leads a group of its own."""

    process: int
    output: Path
    _commands: Commands

    @property
    def printed(self) -> str:
        """What it printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def send(self, number: int, *, to_group: bool = False) -> None:
        """Send a signal."""
        (os.killpg if to_group else os.kill)(self.process, number)

    def status(self) -> int | None:
        """The exit status, less than 0 if a signal ended it; None while it runs."""
        return self._commands.status_of(self.process, 0)

    def wait_for(self, text: str, seconds: float = SECONDS) -> None:
        """Wait until something is printed."""
        deadline = time.monotonic() + seconds
        while text not in self.printed:
            if time.monotonic() > deadline or self.status() is not None:
                self._fail(f"did not print {text!r} in {seconds} s")
            time.sleep(0.02)

    def wait(self, seconds: float = SECONDS) -> int:
        """
        Returns:
            The exit status; less than 0 if a signal ended it.

        Raises:
            AssertionError: it has not ended by then, or its group has not, with the stacks of all
                threads.
        """
        status = self._commands.status_of(self.process, seconds)
        if status is None:
            self._fail(f"did not end in {seconds} s")
        deadline = time.monotonic() + 5
        while group_of(self.process):
            if time.monotonic() > deadline:
                self._fail(f"has ended, but left {group_of(self.process)}")
            time.sleep(0.02)
        self._commands.forget(self.process)
        return status

    def _fail(self, problem: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGABRT)  # faulthandler prints the stacks
            self._commands.status_of(self.process, 5)
            os.killpg(self.process, signal.SIGKILL)
        raise AssertionError(f"{self.process} {problem}:\n{self.printed[-6000:]}")


def group_of(leader: int) -> list[int]:
    """The processes of a group that are alive."""
    return [
        int(fields[0])
        for fields in map(_stat, Path("/proc").glob("[0-9]*"))
        if fields and fields[1] != "Z" and int(fields[3]) == leader
    ]


def _stat(folder: Path) -> list[str]:
    """A process's id, state, parent, group, ...; nothing if it has just ended."""
    try:
        text = (folder / "stat").read_text()
    except OSError:
        return []
    return [folder.name, *text.rpartition(") ")[2].split()]


def _serve() -> dict[str, Any]:
    """Answer requests; in each fork, return what it is to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in IMPORTED:
            importlib.import_module(module)
    gc.freeze()  # or each fork would collect all that was imported, in seconds, when it ends
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "words" in request:
            answer = os.fork()
            if not answer:
                return request
            with contextlib.suppress(PermissionError):
                os.setpgid(answer, answer)
        else:
            answer = request["process"]
            if answer not in ended and (done := os.waitpid(answer, os.WNOHANG))[0]:
                ended[answer] = os.waitstatus_to_exitcode(done[1])
            answer = ended.get(answer)
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _become(
    output: str, errors: str, cwd: str, words: list[str], environment: dict[str, str]
) -> None:
    """Be a Python that was given these words."""
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    files = [(os.devnull, os.O_RDONLY)]
    files += [(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for file in (output, errors)]
    for number, (name, flags) in enumerate(files):
        file = os.open(name, flags)
        os.dup2(file, number)
        os.close(file)
    faulthandler.enable()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    flags = {"-m": 2, "-c": 2}.get(words[0], 1)
    first = str(Path(words[0]).resolve().parent) if flags == 1 else cwd if words[0] == "-m" else ""
    sys.path[:1] = [first, *filter(None, environment["PYTHONPATH"].split(os.pathsep))]
    sys.argv = words if flags == 1 else ["-c", *words[2:]] if words[0] == "-c" else words[1:]


if __name__ == "__main__":
    todo = _serve()
    _become(**todo)
    match todo["words"]:
        case ["-m", module, *_]:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *_]:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [script, *_]:
            runpy.run_path(script, run_name="__main__")
