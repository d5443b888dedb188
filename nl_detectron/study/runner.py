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

from nl_detectron.analysis.metrics import last_aps
from nl_detectron.study.plan import Run

CONFIG, LOG, RESULT = "run.yaml", "run.log", "result.json"


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


def run_all(runs: Sequence[Run], train: Sequence[str], workers: int) -> list[Run]:
    """
    Run ``train --resume --config-file ... OUTPUT_DIR ...`` for each of the runs, as many at a time
    as there are workers. Each has one GPU if there are any, and its share of the cores (unless
    OMP_NUM_THREADS is set). A run that fails does not stop the others; an interrupt stops all.

    Args:
        runs: what :func:`prepare_runs` returned.
        train: the command of train_net.py.
        workers: how many, from 1.

    Returns:
        The runs that failed. Their logs say why.
    """
    return asyncio.run(_run_all(runs, train, workers))


def default_workers() -> int:
    """How many runs at a time: one for each GPU, or for each core where there is none."""
    return torch.cuda.device_count() or os.cpu_count() or 1


async def _run_all(runs: Sequence[Run], train: Sequence[str], workers: int) -> list[Run]:
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
            problem = await _run(run, train, _environment(worker, workers))
            idle.put_nowait(worker)
            if problem:
                failed.append(run)
                log = run.folder / LOG
                progress.write(f"{run}: FAILED, {problem}; see {log}")
                # What an error says is in the last line.
                for line in log.read_text(errors="replace").splitlines()[-1:]:
                    progress.write(f"    {line}")
            else:
                progress.write(f"{run}: {_summary(run)}")
            progress.update()

        await asyncio.gather(*(run_one(run) for run in runs))
    return failed


def _environment(worker: int, workers: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if num_gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus))))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[worker % num_gpus]
    return environment


async def _run(run: Run, train: Sequence[str], environment: dict[str, str]) -> str | None:
    """Train, evaluate, and write the result; returns what went wrong, if anything."""
    arguments = ["--resume", "--config-file", str(run.folder / CONFIG)]
    start = time.monotonic()
    with (run.folder / LOG).open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(*train, *arguments, "OUTPUT_DIR", str(run.folder)),
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
    if status:
        return f"exit status {status}"
    aps = last_aps(run.folder)
    if not aps:
        return "no AP in its metrics.json"
    draft = run.folder / f"{RESULT}.draft"
    draft.write_text(json.dumps({**aps, "seconds": time.monotonic() - start}), encoding="utf-8")
    draft.replace(run.folder / RESULT)
    return None


def _summary(run: Run) -> str:
    result = read_result(run)
    assert result is not None
    aps = [f"{name} {value:.1f}" for name, value in result.items() if name.endswith("/AP")]
    return f"{', '.join(aps)} ({result['seconds']:.0f} s)"
