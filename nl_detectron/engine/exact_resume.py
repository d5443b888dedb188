"""What makes a resumed run end as one that was never interrupted: bit for bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, EvalHook, PeriodicWriter
from detectron2.utils import comm

from nl_detectron.data.seeding import seed_generators
from nl_detectron.data.stream import TrainLoader
from nl_detectron.files import whole_file

logger = logging.getLogger(__name__)

# What takes other values in every run.
_TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")


class ExactResume(HookBase):
    """Each step depends on the state of the model, the optimizer and the schedule, on the seed and
    on its iteration, and on nothing else: the :class:`TrainLoader` starts at the right batch;
    before each step the global generators are seeded by seed, iteration and rank; a seed that was
    drawn, and the last values of the metrics, which writers smooth over a window, are kept in the
    checkpoint; ``metrics.json`` goes back to what it was when the checkpoint was written; and what
    comes after the checkpoint in an iteration (evaluation, the best checkpoint, writers), or after
    the last iteration (``model_final.pth``), is done on resuming.

    It belongs behind the hook that writes checkpoints and before the ``EvalHook``."""

    def __init__(
        self,
        checkpointer: DetectionCheckpointer,
        seed: int,
        window: int = 20,
        *,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            checkpointer: ``metrics.json`` is in its folder.
            seed: if negative one is drawn, the same for all ranks, and a resumed run takes that of
                its checkpoint.
            window: the longest window of a writer.
            config: what is kept in the checkpoint for ``keep_values_of_checkpoint``.
        """
        self.checkpointer = checkpointer
        self._metrics = MetricsFile(Path(checkpointer.save_dir, "metrics.json"))
        self._is_drawn = seed < 0
        if self._is_drawn:
            seed = comm.shared_random_seed()
        self.seed = seed
        self._window = window
        self._run = {"config": dict(config or {}), "processes": comm.get_world_size()}
        self._resumed: dict[str, Any] = {}
        self._finished: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The seed, and the metrics as they are (or were, if a step is done) before the writers."""
        return self._finished or self._state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned in the run to go on with."""
        self._resumed = state
        if self._is_drawn:
            self.seed = state["seed"]

    def before_train(self) -> None:
        start = self.trainer.start_iter
        # Why a run that was to be resumed starts at 0; Detectron2's own checkpointer has none.
        note = "" if start else getattr(self.checkpointer, "note", "")
        if self._is_drawn:
            logger.info(f"SEED is negative: {self.seed} was drawn")
        loader = self.trainer.data_loader
        if isinstance(loader, TrainLoader):
            loader.seed, loader.start_iteration = self.seed, start
        else:
            logger.warning(
                f"The loader is a {type(loader).__name__}, no TrainLoader: a resumed run will not "
                "go on exactly"
            )
        if note:
            logger.warning(note)
        self._restore_metrics(start, is_new=bool(note))
        if start:
            self.trainer.iter = self.trainer.storage.iter = start - 1
            self._save_final(start)
            for hook in self.trainer._hooks:
                if isinstance(hook, (EvalHook, BestCheckpointer, PeriodicWriter)):
                    hook.after_step()

    def before_step(self) -> None:
        self._finished = None
        seed_generators(self.seed, "step", self.trainer.iter, comm.get_rank())

    def after_step(self) -> None:
        self._finished = self._state()

    def batches_of_precise_bn(
        self, loader: TrainLoader, period: int, num_iter: int
    ) -> Iterator[Any]:
        """The batches that ``PreciseBN`` has in a run that was never interrupted."""
        # This runs when PreciseBN asks for its first batch, at the first update after the start.
        done = self.trainer.iter // period if period > 0 else 0
        loader.seed, loader.start_iteration = self.seed, done * num_iter
        yield from loader

    def _save_final(self, start: int) -> None:
        """Save what a run that was killed after its last iteration had no time for."""
        if start > self.trainer.max_iter:
            logger.warning(
                f"The checkpoint is of iteration {start - 1}, but the schedule (SOLVER.MAX_ITER) "
                f"has {self.trainer.max_iter}: nothing is left to train"
            )
        source = getattr(self.checkpointer, "resumed_from", "")
        if start == self.trainer.max_iter and Path(source).name != "model_final.pth":
            self.checkpointer.save("model_final", iteration=start - 1)

    def _state(self) -> dict[str, Any]:
        self._metrics.look()
        storage = self.trainer.storage
        scalars = {
            name: {
                "smoothing_hint": storage.smoothing_hints()[name],
                "values": [list(pair) for pair in history.values()[-self._window :]],
            }
            for name, history in storage.histories().items()
            if name not in _TIMES
        }
        metrics = {"metrics_size": self._metrics.size, "metrics_written": self._metrics.written}
        return {"seed": self.seed, **metrics, "scalars": scalars, **self._run}

    def _restore_metrics(self, start: int, *, is_new: bool) -> None:
        storage, metrics = self.trainer.storage, self._metrics
        for name, scalar in self._resumed.get("scalars", {}).items():
            for value, storage.iter in scalar["values"]:
                storage.put_scalar(name, value, smoothing_hint=scalar["smoothing_hint"])
        storage.iter = start
        if comm.is_main_process():
            if is_new:
                metrics.set_aside()
            elif "metrics_size" in self._resumed:
                written = self._resumed.get("metrics_written", -1)
                metrics.go_back(self._resumed["metrics_size"], written)
        metrics.look(is_ours=False)
        for name, (_, iteration) in list(storage.latest().items()):
            if iteration <= metrics.written:
                del storage.latest()[name]  # or it would be written again


class MetricsFile:
    """``metrics.json``, which Detectron2's ``JSONWriter`` has open all the time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = 0  # when it was looked at last
        self.written = -1  # the highest iteration of the lines that this run has written

    def look(self, *, is_ours: bool = True) -> None:
        """Notice what was added since the last look, by this run or before it."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size != self.size and is_ours:
            with self._path.open("rb") as file:
                file.seek(self.size)
                new = [line.iteration for line in _lines(file.read())]
            self.written = max([self.written, *(i for i in new if i is not None)])
        self.size = size

    def set_aside(self) -> None:
        """Copy all that is there to ``metrics.old.json``, and begin anew."""
        if self._path.exists() and self._path.stat().st_size:
            with whole_file(self._path.with_name("metrics.old.json")) as draft:
                shutil.copyfile(self._path, draft)
            self._overwrite(b"")

    def go_back(self, size: int, written: int) -> None:
        """Remove what was written since the file had these attributes, and what is damaged, with a
        warning. Checkpoints of earlier versions do not know ``written``: -1."""
        content = self._path.read_bytes() if self._path.exists() else b""
        lines = list(_lines(content))
        sound = [(line.iteration, line) for line in lines if line.iteration is not None]
        # By the iteration, which damage does not move, if this run had written anything.
        while sound and (sound[-1][0] > written if written >= 0 else sound[-1][1].start >= size):
            sound.pop()
        iterations = [iteration for iteration, _ in sound]
        problems = []
        if damaged := [line.number for line in lines if line.iteration is None]:
            others = f" and {len(damaged) - 1} more are" if len(damaged) > 1 else " is"
            problems.append(f"line {damaged[0]}{others} left out, as no metrics can be read there")
        if written not in (-1, *iterations):
            problems.append(f"the lines up to iteration {written} are gone")
        if problems:
            logger.warning(f"{self._path} is damaged: {'; '.join(problems)}")
        kept = b"".join(line.text + b"\n" for _, line in sound)
        if kept != content:
            self._overwrite(kept)
        self.written = written if written >= 0 else max(iterations, default=-1)

    def _overwrite(self, content: bytes) -> None:
        """In place, because a writer has the file open, and onto the disk."""
        with self._path.open("r+b") as file:
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())


class _Line(NamedTuple):
    number: int  # from 1
    start: int  # its first byte in the file
    text: bytes
    iteration: int | None  # None if it is damaged


def _lines(content: bytes) -> Iterator[_Line]:
    start = 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        text = line.rstrip(b"\r\n")
        yield _Line(number, start, text, _iteration_of(text))
        start += len(line)


def _iteration_of(line: bytes) -> int | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    iteration = record.get("iteration") if isinstance(record, dict) else None
    return iteration if type(iteration) is int else None
