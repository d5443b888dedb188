"""What is written about non-local blocks while they are trained."""

from __future__ import annotations

import math

from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage
from torch import nn

from nl_detectron.analysis.block_report import mean_abs_gamma, out_weight_norm
from nl_detectron.analysis.recording import nonlocal_blocks


class BlockWeightsHook(HookBase):
    """
    Puts ||W_z|| and the mean of |gamma| of each non-local block into the event storage, from where
    Detectron2's writers take them to TensorBoard and metrics.json, as
    ``nonlocal/backbone.bottom_up.res4.nonlocal4/out_weight_norm`` and ``.../mean_abs_gamma``. A
    block whose gamma stays at 0 learns nothing.
    """

    def __init__(self, model: nn.Module, period: int = 20) -> None:
        """
        Args:
            model: what is trained, not wrapped for distributed training.
            period: put them every so many iterations, and at the last; 20 is the writers' period.
        """
        self._blocks = nonlocal_blocks(model)
        self._period = period

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration % self._period and iteration != self.trainer.max_iter:
            return
        storage = get_event_storage()
        for name, block in self._blocks.items():
            scalars = {
                "out_weight_norm": out_weight_norm(block),
                "mean_abs_gamma": mean_abs_gamma(block),
            }
            for key, value in scalars.items():
                if value is not None:
                    storage.put_scalar(f"nonlocal/{name}/{key}", value, smoothing_hint=False)


class NoEvaluationAfterFailureHook(HookBase):
    """
    Keeps Detectron2's ``EvalHook``, if that comes later, from evaluating after an error in the last
    iteration, which it takes for the end: one process would wait there for all others, and they
    for it.
    """

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            self.trainer.max_iter = math.inf
