"""What is done around each step of training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.engine.hooks import (
    BestCheckpointer,
    EvalHook,
    IterationTimer,
    LRScheduler,
    PeriodicCheckpointer,
    PeriodicWriter,
)
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage
from torch import nn

from nl_detectron.data.seeding import seed_generators
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.exact_resume import ExactResume
from nl_detectron.engine.interruption import Interruption
from nl_detectron.modeling import mean_abs_gamma, nonlocal_blocks, out_weight_norm

logger = logging.getLogger(__name__)

# With a mean of |gamma| below it, a block adds less than a hundredth of a normalised activation.
NEARLY_ZERO_GAMMA = 0.01
# In fewer at the full learning rate gamma gets to about a hundredth at most: docs/STUDY.md.
FULL_RATE_ITERATIONS = 500
_MEASURES = {"out_weight_norm": out_weight_norm, "mean_abs_gamma": mean_abs_gamma}


class BlockWeightsHook(HookBase):
    """Puts ||W_z|| and the mean of |gamma| of each non-local block into the event storage, from
    where Detectron2's writers take them to TensorBoard and metrics.json, as
    ``nonlocal/backbone.bottom_up.res4.nonlocal4/out_weight_norm`` and ``.../mean_abs_gamma``. Warns
    once, after a tenth of the schedule and long enough after the warm-up, of blocks that are still
    nearly the identity, and advises a factor that is not raised already."""

    def __init__(
        self,
        model: nn.Module,
        period: int = 20,
        *,
        warmup_iters: int = 1000,
        gamma_lr_factor: float = 1.0,
        lr_factor: float = 1.0,
    ) -> None:
        self._blocks = nonlocal_blocks(model)
        self._period = period
        self._first_warning = warmup_iters + FULL_RATE_ITERATIONS
        self._advice = {
            "gamma": "GAMMA_LR_FACTOR (such as 100.0)" if gamma_lr_factor < 100 else "",
            "W_z": "LR_FACTOR" if lr_factor <= 1 else "",
        }

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration == max(self.trainer.max_iter // 10, self._first_warning):
            self._warn_of_identities()
        if iteration % self._period and iteration != self.trainer.max_iter:
            return
        storage = get_event_storage()
        for name, block in self._blocks.items():
            for key, measure in _MEASURES.items():
                if (value := measure(block)) is not None:
                    storage.put_scalar(f"nonlocal/{name}/{key}", value, smoothing_hint=False)

    def _warn_of_identities(self) -> None:
        when = f"after {self.trainer.iter + 1} of {self.trainer.max_iter} iterations"
        for name, block in self._blocks.items():
            gamma = mean_abs_gamma(block)
            if out_weight_norm(block) == 0:
                cause, key = "W_z is 0", self._advice["W_z"]
            elif gamma is not None and gamma < NEARLY_ZERO_GAMMA:
                cause, key = f"the mean of |gamma| is {gamma:.2g}", self._advice["gamma"]
            else:
                continue
            advice = f"a higher MODEL.NONLOCAL.{key} lets it learn sooner; " if key else ""
            advice += "see docs/STUDY.md"
            if not any(parameter.requires_grad for parameter in block.parameters()):
                advice = "it is frozen, as its stage is (MODEL.BACKBONE.FREEZE_AT)"
            logger.warning(f"{name} is still nearly the identity {when}, as {cause}: {advice}")


class ProgressHook(HookBase):
    """Says after the first step how long training will take, and adds the epoch and the mean
    weights of the blocks to the lines of Detectron2's ``CommonMetricPrinter``. It belongs before
    the hooks that write."""

    def __init__(self, writers: Sequence[EventWriter]) -> None:
        self._printers = [w for w in writers if isinstance(w, CommonMetricPrinter)]
        self._start = 0.0

    def before_train(self) -> None:
        size = getattr(self.trainer.data_loader, "iterations_per_epoch", None)
        for printer in self._printers:
            printer.logger = _WithEpoch(printer.logger, {"iterations_per_epoch": size})

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        done, number = self.trainer.iter + 1, self.trainer.max_iter
        if self._printers and self.trainer.iter == self.trainer.start_iter < number - 1:
            seconds = time.perf_counter() - self._start
            logger.info(
                f"Iteration {done:,} of {number:,} took {seconds:.2g} s: at this rate, training "
                f"ends in {timedelta(seconds=round(seconds * (number - done)))}, and evaluating "
                "comes to it"
            )


class _WithEpoch(logging.LoggerAdapter):
    def process(self, msg: Any, kwargs: Any) -> tuple[str, Any]:
        storage = get_event_storage()
        line = str(msg).rstrip()
        if size := (self.extra or {}).get("iterations_per_epoch"):
            line += f"  epoch: {(storage.iter + 1) / float(size):.2f}"  # type: ignore[arg-type]
        for key, label in (("mean_abs_gamma", "|gamma|"), ("out_weight_norm", "||W_z||")):
            names = [n for n in storage.latest() if n.startswith("nonlocal/") and n.endswith(key)]
            values = [storage.latest()[name][0] for name in names]
            line += f"  {label}: {sum(values) / len(values):.2g}" if values else ""
        return line, kwargs


class BestCheckpointHook(BestCheckpointer):
    """Detectron2's ``BestCheckpointer`` for runs that may be resumed: which evaluation was the best
    is kept in the run's checkpoints; ``model_best.pth`` has weights alone, and is never what
    ``--resume`` goes on from. It belongs right behind the ``EvalHook``."""

    def __init__(self, eval_period: int, model: nn.Module, output_dir: str, metric: str) -> None:
        super().__init__(eval_period, NonLocalCheckpointer(model, output_dir), metric)
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Of the evaluation whose weights are on the disk: its metric and iteration."""
        return self._saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]

    def after_step(self) -> None:
        if comm.is_main_process():  # others have no results
            super().after_step()
            self._remember()

    def after_train(self) -> None:
        if comm.is_main_process():
            super().after_train()
            self._remember()

    def _remember(self) -> None:
        if self.best_metric is not None:
            self._saved = {"best_metric": self.best_metric, "best_iter": self.best_iter}


class SamplingByImageHook(HookBase):
    """Which anchors and region proposals of an image are sampled is drawn from a seed of its own,
    by the run's seed, the iteration and the image's place in the batch of all ranks: the same for
    any number of ranks. It belongs behind what sets the run's seed, and asks for it in the steps.

    Detectron2 draws from the global generator, for one image after the other, right after it has
    matched what it samples from: so the matchers of a model are wrapped, to seed behind them."""

    # The words in the seeds, which are older than the wrapped matchers: the draws stay the same.
    _DRAWN_BEHIND = {"anchor_matcher": "_subsample_labels", "proposal_matcher": "_sample_proposals"}

    def __init__(self, model: nn.Module, seed: Callable[[], int], images_per_rank: int) -> None:
        self._seed = seed
        self._first_place = comm.get_rank() * images_per_rank
        self._places: dict[str, int] = {}
        for name, module in model.named_modules():
            for matcher, drawn in self._DRAWN_BEHIND.items():
                if (match := getattr(module, matcher, None)) is not None:
                    setattr(module, matcher, self._seeding(f"{name}.{drawn}", match))

    def before_step(self) -> None:
        self._places = {}

    def _seeding(self, key: str, match: Callable[..., Any]) -> Callable[..., Any]:
        def match_and_seed(*args: Any) -> Any:
            matched = match(*args)
            place = self._places.get(key, 0)
            self._places[key] = place + 1
            seed_generators(self._seed(), key, self.trainer.iter, self._first_place + place)
            return matched

        return match_and_seed


def hooks_of_run(
    interruption: Interruption,
    exact_resume: ExactResume,
    block_weights: BlockWeightsHook,
    *,
    evaluate: Callable[[], dict[str, Any]],
    writers: Sequence[EventWriter],
    batch_size: int,
    checkpointing: Mapping[str, Any],
    eval_period: int,
    write_period: int = 20,
    scheduler: Any = None,
    precise_bn: HookBase | None = None,
    after_evaluation: Sequence[HookBase] = (),
) -> list[HookBase]:
    """The hooks of a run, for any of Detectron2's trainers, in order. Only rank 0 has ``writers``;
    ``batch_size`` is that of all ranks together; ``checkpointing`` are the arguments of
    ``PeriodicCheckpointer``; ``scheduler`` is the trainer's by default; ``after_evaluation`` uses
    the results of ``evaluate``, or adds to them."""
    checkpointer, model = exact_resume.checkpointer, exact_resume.checkpointer.model
    images_per_rank = batch_size // comm.get_world_size()

    def evaluate_as_saved() -> dict[str, Any]:
        if comm.get_world_size() > 1:
            for buffer in model.buffers():  # such as batch norm's statistics, of which each has own
                if buffer.is_floating_point():
                    dist.broadcast(buffer, 0)
        return evaluate()

    hooks = [
        # Tells the progress, in the lines of the writers.
        ProgressHook(writers),
        # Measures the blocks, before the writers.
        block_weights,
        # Times the step with what is above.
        IterationTimer(),
        # Sets the learning rate of the next step.
        LRScheduler(scheduler=scheduler),
        # Averages batch norm's statistics anew; changes the model, so before it is saved.
        precise_bn,
        # Saves the run, before what may fail or take longer than there is time.
        PeriodicCheckpointer(checkpointer, **checkpointing) if comm.is_main_process() else None,
        # Ends the run on a signal, saved as this step left it.
        interruption,
        # Seeds each step, and does what follows again on resuming.
        exact_resume,
        # Seeds the sampling of each image, by the run's seed that exact_resume knows.
        SamplingByImageHook(model, lambda: exact_resume.seed, images_per_rank),
        # Evaluates what rank 0 has saved.
        EvalHook(eval_period, evaluate_as_saved),
        # Keeps the best checkpoint, or evaluates once more.
        *after_evaluation,
        # Writes the metrics, with those of the evaluation.
        PeriodicWriter(writers, write_period),
    ]
    return [hook for hook in hooks if hook is not None]
