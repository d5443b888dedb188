"""Running the training runs of a study side by side, and going on where it stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from lab.study.plan import Run
from nl_detectron.analysis.metrics import last_aps
from nl_detectron.files import whole_file

CONFIG, LOG, RESULT, FAILURE = "run.yaml", "run.log", "result.json", "failure.txt"


def prepare_runs(runs: Sequence[Run]) -> list[Run]:
    """
    Make the folders of all runs, each with its config.

    Args:
        runs: all of the study's.

    Returns:
        Those that are not finished.

    Raises:
        ValueError: a folder has the results of another config, which is not touched.
    """
    for run in runs:
        config = run.folder / CONFIG
        if config.exists() and config.read_text(encoding="utf-8") != run.config:
            raise ValueError(
                f"{run.folder} holds a run with other settings ({config}): move it away, or "
                "choose another --output"
            )
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / CONFIG).write_text(run.config, encoding="utf-8")
    return [run for run in runs if read_result(run) is None]


def read_result(run: Run) -> dict[str, float] | None:
    """
    Args:
        run: a run of a plan.

    Returns:
        Of a finished run, "bbox/AP", "bbox/AP50" and so on, in percent, for each task that was
        evaluated, and "seconds", the time that it took since it was last started; else None.
    """
    file = run.folder / RESULT
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def start_command(run: Run, train: Sequence[str]) -> list[str]:
    """
    Args:
        run: a run that has not finished; what an earlier failure left is removed.
        train: the command of train_net.py.

    Returns:
        The command that starts the run, or goes on with it.
    """
    (run.folder / FAILURE).unlink(missing_ok=True)
    config = str(run.folder / CONFIG)
    return [*train, "--resume", "--config-file", config, "OUTPUT_DIR", str(run.folder)]


def keep_result(run: Run, status: int, seconds: float) -> str | None:
    """
    Write down how a run's training ended: its result, or why it failed.

    Args:
        run: the run.
        status: the exit status of its training.
        seconds: how long that took.

    Returns:
        What went wrong, if anything.
    """
    problem = None
    if status:
        problem = f"exit status {status}"
    elif not (aps := last_aps(run.folder)):
        problem = "no AP in its metrics.json"
    name, text = (
        (FAILURE, problem) if problem else (RESULT, json.dumps({**aps, "seconds": seconds}))
    )
    with whole_file(run.folder / name) as draft:
        draft.write_text(text, encoding="utf-8")
    return problem


def run_all(
    runs: Sequence[Run], train: Sequence[str], workers: int, gpus_per_run: int = 1
) -> list[Run]:
    """
    Run ``train --resume --config-file ... OUTPUT_DIR ...`` for each of the runs, as many at a time
    as there are workers. Each has GPUs of its own if there are any, and its share of the cores
    (unless OMP_NUM_THREADS is set). A run that fails does not stop the others; an interrupt stops
    all.

    Args:
        runs: what :func:`prepare_runs` returned.
        train: the command of train_net.py.
        workers: how many, from 1.
        gpus_per_run: how many GPUs each has, from 1.

    Returns:
        The runs that failed. Their logs say why.
    """
    return asyncio.run(_run_all(runs, train, workers, gpus_per_run))


def default_workers(gpus_per_run: int = 1) -> int:
    """
    Args:
        gpus_per_run: how many GPUs each run has, or how many processes where there is none.

    Returns:
        How many runs at a time the GPUs, or the cores where there is none, are enough for.
    """
    return max(1, (torch.cuda.device_count() or os.cpu_count() or 1) // gpus_per_run)


async def _run_all(
    runs: Sequence[Run], train: Sequence[str], workers: int, gpus_per_run: int
) -> list[Run]:
    # SIGTERM, too, stops the children.
    this_task = asyncio.current_task()
    assert this_task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this_task.cancel)
    idle: asyncio.Queue[int] = asyncio.Queue()
    for worker in range(workers):
        idle.put_nowait(worker)
    failed: list[Run] = []
    with tqdm(total=len(runs), unit="run", smoothing=0) as progress:

        async def run_one(run: Run) -> None:
            worker = await idle.get()
            environment = worker_environment(worker, workers, gpus_per_run)
            problem = await _run(run, train, environment)
            idle.put_nowait(worker)
            if problem:
                failed.append(run)
                log = run.folder / LOG
                progress.write(f"{run}: FAILED, {problem}; see {log}")
                # What an error says is in the last line.
                for line in log.read_text(errors="replace").splitlines()[-1:]:
                    progress.write(f"    {line}")
            else:
                progress.write(f"{run}: {summary(run)}")
            progress.update()

        await asyncio.gather(*(run_one(run) for run in runs))
    return failed


def worker_environment(worker: int, workers: int, gpus_per_run: int = 1) -> dict[str, str]:
    """
    Args:
        worker: which of them, from 0.
        workers: how many processes are to share this machine.
        gpus_per_run: how many GPUs each has, or how many processes where there is none.

    Returns:
        The environment variables for its process: GPUs of its own if there are any, and its share
        of the cores (unless OMP_NUM_THREADS is set).
    """
    threads = max(1, (os.cpu_count() or 1) // (workers * gpus_per_run))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if num_gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus))))
        first = worker * gpus_per_run % num_gpus
        own = visible.split(",")[first : first + gpus_per_run]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment


async def _run(run: Run, train: Sequence[str], environment: dict[str, str]) -> str | None:
    """Train, evaluate, and write the result; returns what went wrong, if anything."""
    start = time.monotonic()
    with (run.folder / LOG).open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *start_command(run, train),
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,  # its own group, so that its children stop with it
        )
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.killpg(process.pid, signal.SIGTERM)
                await process.wait()
    return keep_result(run, status, time.monotonic() - start)


def summary(run: Run) -> str:
    """
    Args:
        run: a finished run.

    Returns:
        Its APs and its time, in one line.
    """
    result = read_result(run)
    assert result is not None
    aps = [f"{name} {value:.1f}" for name, value in result.items() if name.endswith("/AP")]
    return f"{', '.join(aps)} ({result['seconds']:.0f} s)"
