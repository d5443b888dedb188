"""What a model's non-local blocks cost: parameters, multiply-adds, time and memory; in training,
too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import inference_context
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from tqdm import tqdm

from lab.memory import peak_memory
from nl_detectron.analysis.flops import flop_handles
from nl_detectron.analysis.recording import record_calls
from nl_detectron.modeling import nonlocal_blocks


@dataclass(frozen=True)
class Cost:
    """The cost of a module in inference."""

    parameters: int
    macs: int
    """Multiply-adds, each counted once: what fvcore calls flops."""
    seconds: float
    """The median of several calls."""
    peak_memory: int
    """Bytes beyond weights and inputs; see :func:`lab.memory.peak_memory`."""


@dataclass(frozen=True)
class CostReport:
    """The cost of a model with its non-local blocks, of the model without them, and of each."""

    with_blocks: Cost
    without_blocks: Cost
    time_ratio: float
    """The median of the ratios of two calls, with and without blocks, that follow each other. Where
    the load of the machine changes, it is steadier than the ratio of the medians."""
    blocks: dict[str, Cost]
    """Block name to its cost, alone, for all that the model gives it; of the memory, the most."""
    block_inputs: dict[str, list[tuple[int, ...]]]
    """Block name to the shapes (B, C, *grid) of what the model gives it."""


@dataclass(frozen=True)
class TrainingCost:
    """The cost of an iteration of training."""

    seconds: float
    """The median of several iterations, waiting for data included."""
    data_share: float
    """How much of the time of all of them was waiting for data, from 0 to 1."""
    peak_memory: int
    """Bytes, weights, gradients and the optimizer's state included."""


def measure_cost(model: nn.Module, inputs: Any, repeats: int = 5) -> CostReport:
    """Measure a model in evaluation mode, called ``repeats`` times with and without its blocks in
    turn, so that whatever else the machine does falls on both. ValueError: it has none."""
    blocks = nonlocal_blocks(model)
    if not blocks:
        raise ValueError("the model has no non-local blocks")
    device = next(model.parameters()).device
    with inference_context(model), torch.no_grad():
        with record_calls(blocks) as calls:
            model(inputs)
        block_inputs = {name: [x for (x,) in of_block] for name, of_block in calls.items()}
        with without_blocks(model):  # the first call of each is not timed
            model(inputs)
        seconds, seconds_without = [], []
        for _ in tqdm(range(repeats), "with and without blocks", leave=False):
            seconds.append(_time(model, inputs))
            with without_blocks(model):
                seconds_without.append(_time(model, inputs))
        cost = _measure_module(model, inputs, device, seconds)
        with without_blocks(model):
            cost_without = _measure_module(model, inputs, device, seconds_without)
        costs = {
            name: _measure_block(block, block_inputs[name], repeats)
            for name, block in tqdm(blocks.items(), "each block", leave=False)
        }
    ratio = statistics.median(a / b for a, b in zip(seconds, seconds_without))
    shapes = {name: [tuple(x.shape) for x in of_block] for name, of_block in block_inputs.items()}
    return CostReport(cost, cost_without, ratio, costs, shapes)


def measure_training(
    trainer: SimpleTrainer, iterations: int = 10
) -> tuple[TrainingCost, TrainingCost]:
    """The cost with the blocks, and that without, in turn, after an iteration of each that is not
    counted. Let the learning rate be 0, and the model stays as it is."""
    model, device = trainer.model, next(trainer.model.parameters()).device
    contexts: list[Callable[[], AbstractContextManager[None]]]
    contexts = [nullcontext, lambda: without_blocks(model)]
    times: list[list[tuple[float, float]]] = [[], []]
    peaks = []
    with EventStorage() as storage:

        def step() -> None:
            trainer.iter = storage.iter
            trainer.run_step()
            storage.step()

        for _ in tqdm(range(iterations + 1), "training", leave=False):
            for of_kind, context in zip(times, contexts):
                with context():
                    seconds = _time(step)
                of_kind.append((seconds, storage.history("data_time").latest()))
        for context in contexts:
            with context():
                trainer.optimizer.zero_grad()
                peaks.append(_held(trainer.optimizer, model) + peak_memory(step, device))
    with_blocks, without = (_training_cost(t[1:], peak) for t, peak in zip(times, peaks))
    return with_blocks, without


def _training_cost(times: Sequence[tuple[float, float]], peak: int) -> TrainingCost:
    """Of pairs of the seconds of an iteration and those in it of waiting for data."""
    seconds, waiting = zip(*times)
    return TrainingCost(statistics.median(seconds), sum(waiting) / sum(seconds), peak)


def _held(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    """Bytes of weights, buffers and the optimizer's state."""
    tensors = [*model.parameters(), *model.buffers()]
    states = [value for p in model.parameters() for value in optimizer.state[p].values()]
    tensors += [value for value in states if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def without_blocks(model: nn.Module) -> Iterator[None]:
    """Within the ``with``, every non-local block of a model is replaced by the identity."""
    blocks = nonlocal_blocks(model)
    _replace(model, {name: nn.Identity() for name in blocks})
    try:
        yield
    finally:
        _replace(model, blocks)


def _replace(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    for name, replacement in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)


def _measure_block(block: nn.Module, inputs: Sequence[Tensor], repeats: int) -> Cost:
    costs = [
        _measure_module(block, x, x.device, [_time(block, x) for _ in range(repeats)])
        for x in inputs
        if x.numel()
    ]
    macs, seconds = sum(cost.macs for cost in costs), sum(cost.seconds for cost in costs)
    peak = max((cost.peak_memory for cost in costs), default=0)
    return Cost(_count_parameters(block), macs, seconds, peak)


def _measure_module(
    module: nn.Module, inputs: Any, device: torch.device, seconds: Sequence[float]
) -> Cost:
    macs, peak = _count_macs(module, inputs), peak_memory(lambda: module(inputs), device)
    return Cost(_count_parameters(module), macs, statistics.median(seconds), peak)


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_macs(module: nn.Module, inputs: Any) -> int:
    # A tuple is what Detectron2's class takes for several arguments.
    analysis = FlopCountAnalysis(module, (inputs,)).set_op_handle(**flop_handles())
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    return int(analysis.total())


def _time(function: Callable[..., object], *arguments: Any) -> float:
    """Seconds that a call takes."""
    _wait()
    start = time.perf_counter()
    function(*arguments)
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """For the GPU, if it is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
