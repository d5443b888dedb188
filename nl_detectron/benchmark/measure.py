"""Time, memory and results of several functions that should do the same."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nl_detectron.analysis.memory import peak_memory

# The passes that are measured. The first is inference: it keeps nothing for a backward pass.
FORWARD = "forward"
FORWARD_BACKWARD = "forward + backward"
PASSES = (FORWARD, FORWARD_BACKWARD)

MEASURED = "measured"
DIFFERS = "differs"
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"
UNAVAILABLE = "unavailable"

# Of results that may differ by rounding: max |actual - expected| / max |expected|.
TOLERANCE = 1e-4
MIN_ROUNDS = 2
# A function that takes longer than this takes no turns: its first run is all.
SLOW_SECONDS = 8.0

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Trial:
    """
    A function to measure.

    Attributes:
        function: takes the inputs and returns one tensor.
        inputs: tensors that require gradients.
        cotangent: the gradient of the function's result, in the shape of the result.
        parameters: further tensors whose gradients are computed.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    cotangent: Tensor
    parameters: tuple[Tensor, ...] = ()

    def run(self, which: str) -> list[Tensor]:
        """The result, and unless ``which`` is the forward pass alone the inputs' gradients."""
        if which == FORWARD:
            with torch.no_grad():
                return [self.function(*self.inputs)]
        result = self.function(*self.inputs)
        gradients = torch.autograd.grad(result, (*self.inputs, *self.parameters), self.cotangent)
        return [result.detach(), *gradients[: len(self.inputs)]]


@dataclass(frozen=True)
class Outcome:
    """
    What became of a function. What was not measured is None.

    Attributes:
        status: "measured", "differs" (from the first function), "out of memory", "failed" (with
            any other error) or "unavailable" (it did not take part).
        seconds: the median of ``runs`` runs.
        memory_bytes: the peak during the pass, less what was there before: inputs and weights.
        difference: max |actual - expected| / max |expected|, the greatest of the results.
        asked_bytes: the size of the tensor for which there was no memory.
        note: the error, or why it is unavailable.
    """

    status: str
    seconds: float | None = None
    runs: int | None = None
    memory_bytes: int | None = None
    difference: float | None = None
    asked_bytes: int | None = None
    note: str = ""


def measure(
    trials: Mapping[str, Trial], which: str, device: torch.device, budget: float
) -> dict[str, Outcome]:
    """
    Measure all ``trials`` in one pass. First each is run once for its memory and its results,
    which have to be those of the first that fits into memory. Then all that passed take turns,
    so that whatever else the machine does meets all alike. The first run's time counts, too: it
    may be longer than the others, but that does not move the median.

    Args:
        trials: by name.
        which: one of ``PASSES``.
        device: where the inputs are.
        budget: seconds for which they take turns, all together; at least ``MIN_ROUNDS`` times.
    """
    outcomes: dict[str, Outcome] = {}
    seconds: dict[str, list[float]] = {}
    expected: list[Tensor] = []
    for name, trial in trials.items():
        try:
            examination = _examine(trial, which, device)
        except (RuntimeError, MemoryError) as error:
            outcomes[name] = _failure(error)
            continue
        difference = relative_difference(examination.results, expected) if expected else None
        expected = expected or examination.results
        if difference is not None and not difference <= TOLERANCE:  # NaN differs, too
            outcomes[name] = Outcome(DIFFERS, difference=difference)
            continue
        outcomes[name] = Outcome(
            MEASURED, memory_bytes=examination.memory_bytes, difference=difference
        )
        seconds[name] = [examination.seconds]
    expected.clear()

    turns = {name: trials[name] for name in seconds if seconds[name][0] < SLOW_SECONDS}
    for name, times in _take_turns(turns, which, device, budget).items():
        seconds[name] += times
    for name, times in seconds.items():
        outcomes[name] = replace(outcomes[name], seconds=statistics.median(times), runs=len(times))
    return outcomes


def relative_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """max |actual - expected| / max |expected|, the greatest over the pairs of tensors."""
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or PyTorch raised it for want of memory."""
    return isinstance(error, MemoryError) or asked_bytes(str(error)) is not None


def asked_bytes(message: str) -> int | None:
    """The bytes that PyTorch says it tried to allocate, if it does."""
    found = re.search(r"tried to allocate ([\d.]+) ?(\w+)", message, re.IGNORECASE)
    return None if found is None else round(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class _Examination:
    results: list[Tensor]
    seconds: float
    memory_bytes: int


def _examine(trial: Trial, which: str, device: torch.device) -> _Examination:
    """Run a function for the first time."""
    if device.type == "cuda":
        trial.run(which)  # libraries allocate their workspaces at the first call
    results: list[Tensor] = []
    seconds: list[float] = []

    def run() -> None:
        seconds.append(_time(lambda: results.extend(trial.run(which)), device))

    memory_bytes = peak_memory(run, device)
    return _Examination(results, seconds[0], memory_bytes)


def _failure(error: RuntimeError | MemoryError) -> Outcome:
    if is_out_of_memory(error):
        return Outcome(OUT_OF_MEMORY, asked_bytes=asked_bytes(str(error)))
    return Outcome(FAILED, note=str(error))


def _take_turns(
    trials: Mapping[str, Trial], which: str, device: torch.device, budget: float
) -> dict[str, list[float]]:
    """The seconds of each run, the same number of runs for all."""
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    rounds, begin = 0, time.perf_counter()
    while trials and (rounds < MIN_ROUNDS or time.perf_counter() - begin < budget):
        for name, trial in trials.items():
            seconds[name].append(_time(partial(trial.run, which), device))
        rounds += 1
    return seconds


def _time(function: Callable[[], object], device: torch.device) -> float:
    """The seconds that a call takes; on CUDA until the device has done what it was given."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
