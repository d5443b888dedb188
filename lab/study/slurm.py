"""The training runs of a study as jobs of a SLURM cluster, one a run, through submitit."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.study.plan import TrainingRun
from lab.study.runner import LOG, keep_result, read_result, start_command

JOB = "slurm_job"
"""The file in a run's folder that holds the id of its last job."""

_CPUS_PER_GPU = 5  # a process and its four loader workers
_TIME = 24 * 60  # minutes; a run that needs longer goes on in the same job, requeued
_GRACE = 120  # seconds, for the step and for writing the checkpoint
_MAX_TIMEOUTS = 1000  # each leaves a checkpoint, so a run comes to its end
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "PREEMPTED"}


class TrainingJob:
    """
    Train and evaluate a run, and keep its result.

    Shortly before its time is up, and on clusters that announce a preemption by the same signal,
    submitit calls :meth:`checkpoint` and has SLURM requeue the job under its id, which then goes
    on. SIGTERM comes with every preemption, where SLURM itself requeues, and with ``scancel``,
    where nobody does: the training writes its checkpoint, and the job waits for its end.
    """

    def __init__(self, run: TrainingRun, train: Sequence[str]) -> None:
        self._run, self._train = run, list(train)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def __call__(self) -> None:
        """RuntimeError: the training failed; the message says where its log is."""
        start = time.monotonic()
        log = self._run.folder / LOG
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                start_command(self._run, self._train),
                # torchrun's own are 30 s
                env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_GRACE), **os.environ},
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # it gets our signals, not also those of SLURM
            )
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        status = self._process.wait()
        while self._stopping:
            signal.pause()
        if problem := keep_result(self._run, status, time.monotonic() - start):
            raise RuntimeError(f"{self._run}: {problem}; see {log}")

    def checkpoint(self) -> Any:
        """
        Have the training write its checkpoint and end; submitit calls this in a signal handler, and
        runs what it returns when the job starts again: the same.
        """
        self._stop()
        if self._process is not None:
            # Not its wait(), which this signal may have interrupted.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return _submitit().helpers.DelayedSubmission(TrainingJob(self._run, self._train))

    def _stop(self) -> None:
        if self._process is not None and not self._stopping:
            self._stopping = True  # a second SIGTERM would end it at once
            self._process.terminate()


def submit(
    runs: Sequence[TrainingRun],
    train: Sequence[str],
    folder: Path,
    gpus_per_run: int,
    parameters: Mapping[str, Any],
    cluster: str = "slurm",
) -> list[TrainingRun]:
    """
    Submit one job for each run; their logs go into ``folder``, which all nodes see. ``parameters``
    are passed on to ``sbatch``. On the ``cluster`` "local" all run at once on this machine; those
    that failed are returned. ValueError: there is no submitit or SLURM, or it refuses a parameter.
    """
    submitit = _submitit()
    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ValueError("there is no sbatch and srun: is this a login node of a SLURM cluster?")
    limit = {"slurm_max_num_timeout": _MAX_TIMEOUTS}
    executor, jobs = submitit.AutoExecutor(folder.absolute(), cluster, **limit), []
    try:
        executor.update_parameters(
            timeout_min=parameters.get("time", _TIME),
            gpus_per_node=gpus_per_run,
            cpus_per_task=gpus_per_run * _CPUS_PER_GPU,
            stderr_to_stdout=True,
            slurm_signal_delay_s=_GRACE,
            slurm_additional_parameters={"requeue": True},  # after the failure of a node
            **{f"slurm_{key}": value for key, value in parameters.items()},
        )
        for run in runs:
            name, comment = f"{run.setting}-{run.seed}", str(run.folder.absolute())
            executor.update_parameters(name=name, slurm_comment=comment)
            jobs.append(executor.submit(TrainingJob(run, train)))
            (run.folder / JOB).write_text(f"{jobs[-1].job_id}\n", encoding="utf-8")
    except (ValueError, NameError, submitit.core.utils.FailedJobError) as error:
        raise ValueError(f"SLURM: {' '.join(str(error).split())}") from error
    if cluster == "slurm":
        return []
    for job in jobs:
        job.wait()
    return [run for run in runs if read_result(run) is None]


def read_queue() -> dict[Path, tuple[str, str]]:
    """The user's jobs: absolute folder of the run to job id and "waiting" or "running"; none where
    there is no SLURM. ValueError: it does not answer, so that nobody knows what runs."""
    if not shutil.which("squeue"):
        return {}
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%T|%k"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"squeue: {' '.join(done.stderr.split())}")
    jobs = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {
        Path(comment): (number, "waiting" if state in _WAITING else "running")
        for number, state, comment in jobs
    }


def read_parameters(words: Sequence[str]) -> dict[str, Any]:
    """The parameters in words such as "partition=gpu" and "time=2880", with numbers as such."""
    pairs = {key: value for key, _, value in (word.partition("=") for word in words)}
    for key, value in pairs.items():
        if not key or not value:
            raise ValueError(f"--slurm is {key!r}, not KEY=VALUE such as partition=gpu")
    if not pairs.get("time", "0").isdecimal():
        raise ValueError(f"--slurm time is {pairs['time']!r}, not a number of minutes")
    return {key: int(value) if value.isdecimal() else value for key, value in pairs.items()}


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise ValueError("SLURM needs submitit: pip install submitit") from error
