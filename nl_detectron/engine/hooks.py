"""What is done around each step of training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from nl_detectron.data.stream import seed_generators
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.modeling import mean_abs_gamma, nonlocal_blocks, out_weight_norm

logger = logging.getLogger(__name__)

NEARLY_ZERO_GAMMA = 0.01
"""Below this mean of |gamma|, a block adds less than a hundredth of a normalised activation."""


class BlockWeightsHook(HookBase):
    """
    Puts ||W_z|| and the mean of |gamma| of each non-local block into the event storage, from where
    Detectron2's writers take them to TensorBoard and metrics.json, as
    ``nonlocal/backbone.bottom_up.res4.nonlocal4/out_weight_norm`` and ``.../mean_abs_gamma``.
    Warns once of blocks that are still nearly the identity after a tenth of the schedule.
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
        if iteration == self.trainer.max_iter // 10:
            self._warn_of_identities()
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

    def _warn_of_identities(self) -> None:
        when = f"after {self.trainer.iter + 1} of {self.trainer.max_iter} iterations"
        for name, block in self._blocks.items():
            gamma = mean_abs_gamma(block)
            if out_weight_norm(block) == 0:
                cause, key = "W_z is 0", "LR_FACTOR"
            elif gamma is not None and gamma < NEARLY_ZERO_GAMMA:
                cause, key = (
                    f"the mean of |gamma| is {gamma:.2g}",
                    "GAMMA_LR_FACTOR (such as 100.0)",
                )
            else:
                continue
            advice = f"a higher MODEL.NONLOCAL.{key} lets it learn sooner; see docs/STUDY.md"
            if not any(parameter.requires_grad for parameter in block.parameters()):
                advice = "it is frozen, as its stage is (MODEL.BACKBONE.FREEZE_AT)"
            logger.warning(f"{name} is still nearly the identity {when}, as {cause}: {advice}")


class NoEvaluationAfterFailureHook(HookBase):
    """
    Keeps Detectron2's ``EvalHook``, if that comes later, from evaluating after an error in the last
    iteration, which it takes for the end: one process would wait there for all others, and they
    for it.
    """

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            self.trainer.max_iter = math.inf


class BestCheckpointHook(BestCheckpointer):
    """
    Detectron2's ``BestCheckpointer`` for runs that may be resumed: which evaluation was the best is
    kept in the run's checkpoints; ``model_best.pth`` has weights alone, and is never what
    ``--resume`` goes on from. It belongs right behind the ``EvalHook``.
    """

    def __init__(self, eval_period: int, model: nn.Module, output_dir: str, metric: str) -> None:
        """
        Args:
            eval_period: that of the ``EvalHook``.
            model: what is trained, not wrapped for distributed training.
            output_dir: the folder of the run.
            metric: what is highest in the best evaluation, such as "bbox/AP".
        """
        super().__init__(eval_period, NonLocalCheckpointer(model, output_dir), metric)
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Of the evaluation whose weights are on the disk: its metric and iteration."""
        return self._saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Args:
            state: what :meth:`state_dict` returned in the run to go on with.
        """
        self._saved = state
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]

    def _best_checking(self) -> None:
        if comm.is_main_process():  # others have no results
            super()._best_checking()
            if self.best_metric is not None:
                self._saved = {"best_metric": self.best_metric, "best_iter": self.best_iter}


class SamplingByImageHook(HookBase):
    """
    Which anchors and region proposals of an image are sampled is drawn from a seed of its own, by
    the run's seed, the iteration and the image's place in the batch of all ranks: the same for any
    number of ranks. It belongs behind what sets the run's seed.
    """

    def __init__(self, model: nn.Module, seed: Callable[[], int], images_per_rank: int) -> None:
        """
        Args:
            model: one of Detectron2's; its methods that sample for an image are wrapped.
            seed: gives the run's seed once training has begun.
            images_per_rank: how many images each rank has in an iteration.
        """
        self._seed = seed
        self._first_place = comm.get_rank() * images_per_rank
        self._places: dict[str, int] = {}
        for name, module in model.named_modules():
            for method in ("_subsample_labels", "_sample_proposals"):
                if hasattr(module, method):
                    setattr(module, method, self._seeded(f"{name}.{method}", module, method))

    def before_step(self) -> None:
        self._places = {}

    def _seeded(self, key: str, module: nn.Module, method: str) -> Callable[..., Any]:
        sample = getattr(module, method)

        def sample_of_image(*args: Any, **kwargs: Any) -> Any:
            place = self._places.get(key, 0)
            self._places[key] = place + 1
            seed_generators(self._seed(), key, self.trainer.iter, self._first_place + place)
            return sample(*args, **kwargs)

        return sample_of_image
