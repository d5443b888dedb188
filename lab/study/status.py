"""Which runs of a study wait, run, are finished or have failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from lab.study.plan import TrainingRun
from lab.study.runner import FAILURE, read_result, summary
from lab.study.slurm import JOB, read_queue
from nl_detectron.files import is_used


@dataclass(frozen=True)
class State:
    """Where a run stands."""

    run: TrainingRun
    name: str  # "waiting", "running", "finished" or "failed"
    job: str = ""  # the id of its last job on SLURM, if it has had one
    note: str = ""  # its APs if it is finished; why it failed

    @property
    def is_busy(self) -> bool:
        """Whether it is running, or waits in SLURM's queue: it must not be started again."""
        return self.name == "running" or (self.name == "waiting" and bool(self.job))


def read_states(runs: Sequence[TrainingRun]) -> list[State]:
    """The state of each: "waiting" also for a run that was stopped and can go on."""
    queue = read_queue()
    return [_state(run, queue) for run in runs]


def state_table(states: Sequence[State]) -> str:
    """A table with a line for each run."""
    rows = [[s.run.setting, s.run.seed, s.name, s.job, s.note] for s in states]
    return tabulate(rows, ["setting", "seed", "state", "job", ""], disable_numparse=True)


def _state(run: TrainingRun, queue: dict[Path, tuple[str, str]]) -> State:
    job = _read(run.folder / JOB)
    if read_result(run) is not None:
        return State(run, "finished", job, summary(run))
    if run.folder.absolute() in queue:
        job, name = queue[run.folder.absolute()]
        return State(run, name, job)
    if is_used(run.folder):
        return State(run, "running", job)
    if failure := _read(run.folder / FAILURE):
        return State(run, "failed", job, failure)
    if job:
        return State(run, "failed", job, "its job has ended: cancelled, out of memory, or lost")
    return State(run, "waiting")


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""
