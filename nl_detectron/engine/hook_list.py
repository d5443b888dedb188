"""What is done around each step of a run, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.engine.hooks import (
    EvalHook,
    IterationTimer,
    LRScheduler,
    PeriodicCheckpointer,
    PeriodicWriter,
)
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from nl_detectron.engine.exact_resume import ExactResume
from nl_detectron.engine.hooks import BlockWeightsHook, SamplingByImageHook, share_buffers
from nl_detectron.engine.interruption import Interruption


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
    """
    The hooks of a run, for any of Detectron2's trainers.

    Args:
        interruption: ends the run on a signal.
        exact_resume: with the checkpointer of the run.
        block_weights: with the model.
        evaluate: returns a nested dict of metrics, as Detectron2's ``EvalHook`` wants it.
        writers: of rank 0.
        batch_size: the images of an iteration, of all ranks together.
        checkpointing: the arguments of Detectron2's ``PeriodicCheckpointer``, such as ``period``.
        eval_period, write_period: in iterations.
        scheduler: for the learning rate; by default the trainer's.
        precise_bn: Detectron2's ``PreciseBN``.
        after_evaluation: what uses its results, or adds to them.

    Returns:
        Them.
    """
    checkpointer, model = exact_resume.checkpointer, exact_resume.checkpointer.model
    images_per_rank = batch_size // comm.get_world_size()

    def evaluate_as_saved() -> dict[str, Any]:
        share_buffers(model)
        return evaluate()

    hooks = [
        # Measures the blocks; first, so that it comes before the writers.
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
        PeriodicWriter(writers, write_period) if comm.is_main_process() else None,
    ]
    return [hook for hook in hooks if hook is not None]
