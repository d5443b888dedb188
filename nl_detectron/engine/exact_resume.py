"""What makes a resumed run end as one that was never interrupted: bit for bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, EvalHook, PeriodicWriter, PreciseBN
from detectron2.utils import comm

from nl_detectron.data.stream import TrainLoader, seed_generators

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
    comes after the checkpoint in an iteration (evaluation, the best checkpoint, writers) is done
    again on resuming.

    It belongs behind the hook that writes checkpoints and before the ``EvalHook``.
    """

    def __init__(self, checkpointer: DetectionCheckpointer, seed: int, window: int = 20) -> None:
        """
        Args:
            checkpointer: of the run; ``metrics.json`` is in its folder.
            seed: of the run; if negative one is drawn, the same for all ranks, and a resumed run
                takes that of its checkpoint.
            window: the longest window of a writer.
        """
        self._checkpointer = checkpointer
        self._metrics = Path(checkpointer.save_dir, "metrics.json")
        self._is_drawn = seed < 0
        if self._is_drawn:
            seed = comm.shared_random_seed()
        self.seed = seed
        self._window = window
        self._resumed: dict[str, Any] = {}
        self._finished: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The seed, and the metrics as they are (or were, if a step is done) before the writers."""
        return self._finished or self._state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Args:
            state: what :meth:`state_dict` returned in the run to go on with.
        """
        self._resumed = state
        if self._is_drawn:
            self.seed = state["seed"]

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if self._is_drawn:
            logger.info(f"SEED is negative: {self.seed} was drawn")
        self._position(self.trainer.data_loader, start)
        for hook in self.trainer._hooks:
            if isinstance(hook, PreciseBN) and not hook._disabled:
                done = start // hook._period if hook._period > 0 else 0
                self._position(hook._data_loader, done * hook._num_iter)
        self._restore_metrics(start)
        if not start and self._note:
            logger.warning(self._note)
        if start:
            self.trainer.iter = self.trainer.storage.iter = start - 1
            for hook in self.trainer._hooks:
                if isinstance(hook, (EvalHook, BestCheckpointer, PeriodicWriter)):
                    hook.after_step()

    def before_step(self) -> None:
        self._finished = None
        seed_generators(self.seed, "step", self.trainer.iter, comm.get_rank())

    def after_step(self) -> None:
        self._finished = self._state()

    @property
    def _note(self) -> str:
        """Why a run that was to be resumed is not, if it starts at 0."""
        return getattr(self._checkpointer, "note", "")  # Detectron2's own has none

    def _position(self, loader: Any, start: int) -> None:
        if isinstance(loader, TrainLoader):
            loader.seed, loader.start_iteration = self.seed, start
        else:
            logger.warning(
                f"The loader is a {type(loader).__name__}, no TrainLoader: a resumed run will not "
                "go on exactly"
            )

    def _state(self) -> dict[str, Any]:
        storage = self.trainer.storage
        scalars = {
            name: {
                "smoothing_hint": storage.smoothing_hints()[name],
                "values": [list(pair) for pair in history.values()[-self._window :]],
            }
            for name, history in storage.histories().items()
            if name not in _TIMES
        }
        size = self._metrics.stat().st_size if self._metrics.exists() else 0
        return {"seed": self.seed, "metrics_size": size, "scalars": scalars}

    def _restore_metrics(self, start: int) -> None:
        storage = self.trainer.storage
        for name, scalar in self._resumed.get("scalars", {}).items():
            for value, storage.iter in scalar["values"]:
                storage.put_scalar(name, value, smoothing_hint=scalar["smoothing_hint"])
        storage.iter = start
        is_restart = not start and bool(self._note)
        size = 0 if is_restart else self._resumed.get("metrics_size")
        if size is None or not comm.is_main_process() or not self._metrics.exists():
            return
        if is_restart and self._metrics.stat().st_size:
            shutil.copy(self._metrics, self._metrics.with_name("metrics.old.json"))
        # In place, because a writer has it open.
        os.truncate(self._metrics, min(size, self._metrics.stat().st_size))
        lines = self._metrics.read_text(encoding="utf-8").splitlines()
        last = max((json.loads(line)["iteration"] for line in lines), default=-1)
        for hook in self.trainer._hooks:
            for writer in hook._writers if isinstance(hook, PeriodicWriter) else ():
                if getattr(writer, "_last_write", None) == -1:
                    writer._last_write = last  # what is older has been written
