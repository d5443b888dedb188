"""
Command lines in forks of one process that has done the imports: ``sys.argv`` and ``__main__`` are
as if Python had been given the script, each starts at once, and ends as Python ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A small training, of what small_runs.py registers: it takes a tenth of a second a step.
CONFIG = str(ROOT / "configs" / "quick_start.yaml")
OVERRIDES = [
    *("MODEL.DEVICE", "cpu", "SEED", "7", "SOLVER.WARMUP_ITERS", "5", "SOLVER.STEPS", "(12,)"),
    *("DATASETS.TRAIN", "('few_train',)", "DATASETS.TEST", "('few_val',)"),
    *("TEST.DETECTIONS_PER_IMAGE", "3", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
    *("INPUT.MIN_SIZE_TRAIN", "(32,48)", "INPUT.MIN_SIZE_TEST", "32", "INPUT.MAX_SIZE_TRAIN", "64"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[16,16]", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.NONLOCAL.BACKBONE", "build_thin_backbone", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"),
]
SECONDS = 60  # far more than any takes, on a machine that does nothing else


class Commands:
    """Starts command lines, and waits for their ends."""

    def __init__(self, *modules: Path) -> None:
        """
        Args:
            *modules: files, imported before the first fork.
        """
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._started: set[int] = set()
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *map(str, modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self._started:  # a test may have failed before it ended
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        self._server.kill()
        self._server.communicate()

    def start(self, output: Path, *words: Any, **environment: Any) -> Command:
        """
        Args:
            output: a file; what is printed is added to it.
            *words: the script and its arguments.
            **environment: variables to add.
        """
        request = {
            "output": str(output),
            "words": list(map(str, words)),
            "environment": {name: str(value) for name, value in environment.items()},
        }
        process = self._ask(request)
        self._started.add(process)
        return Command(process, output, self)

    def status_of(self, process: int, seconds: float) -> int | None:
        """The exit status; None if it has not ended by then."""
        return self._ask({"process": process, "seconds": seconds})

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


def _serve(modules: list[str]) -> dict[str, Any]:
    """Answer requests; in each fork, return what it is to do."""
    for module in map(Path, modules):
        sys.path.insert(0, str(module.parent))
        importlib.import_module(module.stem)
    gc.freeze()  # or each fork would collect all that was imported, in seconds, when it ends
    ended: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer = None
        if "words" in request:
            answer = os.fork()
            if not answer:
                return request
            os.setpgid(answer, answer)
        elif ended.get(request["process"]) is None:
            ended[request["process"]] = _status(**request)
        answer = answer or ended[request["process"]]
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _status(process: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def _become(output: str, words: list[str], environment: dict[str, str]) -> None:
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    os.close(nothing)
    faulthandler.enable()
    os.environ.update(environment)
    sys.argv = words


if __name__ == "__main__":
    _become(**_serve(sys.argv[1:]))
    runpy.run_path(sys.argv[0], run_name="__main__")
