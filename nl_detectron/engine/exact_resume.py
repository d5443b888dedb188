"""What makes a resumed run end as one that was never interrupted: bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, EvalHook, PeriodicWriter
from detectron2.utils import comm

from nl_detectron.data.seeding import seed_generators
from nl_detectron.data.stream import TrainLoader
from nl_detectron.engine.metrics_file import MetricsFile

logger = logging.getLogger(__name__)

# What takes other values in every run.
_TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")


class ExactResume(HookBase):
    """
    Each step depends on the state of the model, the optimizer and the schedule, on the seed and on
    its iteration, and on nothing else: the :class:`TrainLoader` starts at the right batch; before
    each step the global generators are seeded by seed, iteration and rank; a seed that was drawn,
    and the last values of the metrics, which writers smooth over a window, are kept in the
    checkpoint; ``metrics.json`` goes back to what it was when the checkpoint was written; and what
    comes after the checkpoint in an iteration (evaluation, the best checkpoint, writers), or after
    the last iteration (``model_final.pth``), is done on resuming.

    It belongs behind the hook that writes checkpoints and before the ``EvalHook``.
    """

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
            checkpointer: of the run; ``metrics.json`` is in its folder.
            seed: of the run; if negative one is drawn, the same for all ranks, and a resumed run
                takes that of its checkpoint.
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
        if not start and self._note:
            logger.warning(self._note)
        self._restore_metrics(start)
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
    ) -> PreciseBNBatches:
        """What ``PreciseBN`` with this period and number of iterations takes for its loader."""
        return PreciseBNBatches(self, loader, period, num_iter)

    @property
    def _note(self) -> str:
        """Why a run that was to be resumed is not, if it starts at 0."""
        return getattr(self.checkpointer, "note", "")  # Detectron2's own has none

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

    def _restore_metrics(self, start: int) -> None:
        storage, metrics = self.trainer.storage, self._metrics
        for name, scalar in self._resumed.get("scalars", {}).items():
            for value, storage.iter in scalar["values"]:
                storage.put_scalar(name, value, smoothing_hint=scalar["smoothing_hint"])
        storage.iter = start
        if comm.is_main_process():
            if not start and self._note:
                metrics.set_aside()
            elif "metrics_size" in self._resumed:
                written = self._resumed.get("metrics_written", -1)
                metrics.go_back(self._resumed["metrics_size"], written)
        metrics.look(is_ours=False)
        for name, (_, iteration) in list(storage.latest().items()):
            if iteration <= metrics.written:
                del storage.latest()[name]  # or it would be written again


class PreciseBNBatches:
    """The batches that ``PreciseBN`` has in a run that was never interrupted."""

    def __init__(self, run: ExactResume, loader: TrainLoader, period: int, num_iter: int) -> None:
        self._run, self._loader, self._period, self._num_iter = run, loader, period, num_iter

    def __iter__(self) -> Iterator[Any]:
        # PreciseBN asks once, at the first update after the start.
        done = self._run.trainer.iter // self._period if self._period > 0 else 0
        self._loader.seed, self._loader.start_iteration = self._run.seed, done * self._num_iter
        return iter(self._loader)
