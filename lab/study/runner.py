"""Running the training runs of a study side by side, and going on where it stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from lab.study.plan import TrainingRun
from nl_detectron.analysis.metrics import last_aps, metrics_file
from nl_detectron.files import whole_file

TRAIN = [sys.executable, str(Path(__file__).resolve().parents[2] / "train_net.py")]
CONFIG, LOG, RESULT, FAILURE = "run.yaml", "run.log", "result.json", "failure.txt"
_WATCH_SECONDS = 5.0  # between looks at how far the runs are


def prepare_runs(runs: Sequence[TrainingRun]) -> list[TrainingRun]:
    """Make the folders of all runs; returns those that are not finished. ValueError: a folder has
    the results of another config."""
    for run in runs:
        config = run.folder / CONFIG
        if config.exists() and config.read_text(encoding="utf-8") != run.config:
            raise ValueError(
                f"{run.folder} holds a run with other settings ({config}): move it away, or "
                "choose another folder"
            )
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / CONFIG).write_text(run.config, encoding="utf-8")
    return [run for run in runs if read_result(run) is None]


def read_result(run: TrainingRun) -> dict[str, float] | None:
    """Of a finished run "bbox/AP" and so on, in percent, and "seconds" since its last start."""
    file = run.folder / RESULT
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def start_command(run: TrainingRun, train: Sequence[str]) -> list[str]:
    """What starts an unfinished run or goes on with it; what a failure left is removed."""
    (run.folder / FAILURE).unlink(missing_ok=True)
    data = run.data.options if run.data else []
    config = str(run.folder / CONFIG)
    return [*train, "--resume", *data, "--config-file", config, "OUTPUT_DIR", str(run.folder)]


def keep_result(run: TrainingRun, status: int, seconds: float) -> str | None:
    """Write down the result of a run, or why it failed; returns what went wrong, if anything."""
    problem = f"exit status {status}" if status else None
    aps = {} if status else last_aps(run.folder)
    if not status and not aps:
        problem = "no AP in its metrics.json"
    name, text = (
        (FAILURE, problem) if problem else (RESULT, json.dumps({**aps, "seconds": seconds}))
    )
    with whole_file(run.folder / name) as draft:
        draft.write_text(text, encoding="utf-8")
    return problem


def run_all(
    runs: Sequence[TrainingRun], train: Sequence[str], workers: int, gpus_per_run: int = 1
) -> list[TrainingRun]:
    """
    Start runs, as many at a time as there are workers, each with GPUs of its own if there are any,
    and its share of the cores (unless OMP_NUM_THREADS is set). An interrupt stops all. Returns the
    runs that failed; their logs say why.
    """
    return asyncio.run(_run_all(runs, train, workers, gpus_per_run))


def default_workers(gpus_per_run: int = 1) -> int:
    """How many runs at a time the GPUs are enough for or, where there is none, the cores."""
    return max(1, (torch.cuda.device_count() or os.cpu_count() or 1) // gpus_per_run)


async def _run_all(
    runs: Sequence[TrainingRun], train: Sequence[str], workers: int, gpus_per_run: int
) -> list[TrainingRun]:
    # SIGTERM, too, stops the children.
    this_task = asyncio.current_task()
    assert this_task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this_task.cancel)
    idle: asyncio.Queue[int] = asyncio.Queue()
    for worker in range(workers):
        idle.put_nowait(worker)
    failed: list[TrainingRun] = []
    total = sum(run.iterations for run in runs)
    with tqdm(total=total, initial=_iterations_done(runs), unit="iteration") as progress:

        async def run_one(run: TrainingRun) -> None:
            worker = await idle.get()
            environment = _worker_environment(worker, workers, gpus_per_run)
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

        async def watch() -> None:
            while True:
                await asyncio.sleep(_WATCH_SECONDS)
                # One that goes on from a checkpoint does some again.
                progress.update(max(_iterations_done(runs) - progress.n, 0))

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(run_one(run) for run in runs))
        watching.cancel()
        progress.update(_iterations_done(runs) - progress.n)
    return failed


def _iterations_done(runs: Sequence[TrainingRun]) -> int:
    """By the last lines of ``metrics.json``, the last of which may be half written."""
    done = 0
    for run in runs:
        if (file := metrics_file(run.folder)).is_file():
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - 2**14))
                found = re.findall(rb'"iteration": (\d+)', stream.read())
            done += min(int(found[-1]) + 1, run.iterations) if found else 0
    return done


def _worker_environment(worker: int, workers: int, gpus_per_run: int) -> dict[str, str]:
    """The variables for the process of one of the workers: its GPUs, its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // (workers * gpus_per_run))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if num_gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus))))
        first = worker * gpus_per_run % num_gpus
        own = visible.split(",")[first : first + gpus_per_run]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment


async def _run(run: TrainingRun, train: Sequence[str], environment: dict[str, str]) -> str | None:
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


def summary(run: TrainingRun) -> str:
    """The APs and the time of a finished run, in one line."""
    result = read_result(run)
    assert result is not None
    aps = [f"{name} {value:.1f}" for name, value in result.items() if name.endswith("/AP")]
    return f"{', '.join(aps)} ({result['seconds']:.0f} s)"
