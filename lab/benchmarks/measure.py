"""Time, memory and results of several functions that should do the same."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer, timer

from lab.memory import peak_memory

# What is measured. "forward" is inference: it keeps nothing for a backward pass.
FORWARD, FORWARD_BACKWARD = "forward", "forward + backward"

MEASURED, DIFFERS, OUT_OF_MEMORY = "measured", "differs", "out of memory"
FAILED, UNAVAILABLE = "failed", "unavailable"

# Of results that may differ by rounding: max |actual - expected| / max |expected|.
TOLERANCE = 1e-4
TOLERANCES = {"fp32": TOLERANCE, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
MIN_ROUNDS = 2
# A function that takes longer than this takes no turns: its first run is all.
SLOW_SECONDS = 8.0
# On a GPU, of a fast one.
MAX_IN_A_ROW, MIN_SECONDS_IN_A_ROW = 50, 0.01
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Trial(NamedTuple):
    """A function from tensors that require gradients to one tensor."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    grad_output: Tensor  # the gradient of the function's result
    parameters: tuple[Tensor, ...] = ()  # further tensors whose gradients are computed

    def run(self, which: str) -> list[Tensor]:
        """The result, and unless ``which`` is the forward pass alone the inputs' gradients."""
        if which == FORWARD:
            with torch.no_grad():
                return [self.function(*self.inputs)]
        result = self.function(*self.inputs)
        wanted = (*self.inputs, *self.parameters)
        gradients = torch.autograd.grad(result, wanted, self.grad_output.to(result.dtype))
        return [result.detach(), *gradients[: len(self.inputs)]]


@dataclass(frozen=True)
class Outcome:
    """What became of a function. What was not measured is None."""

    status: str  # DIFFERS is from the first function, FAILED with any other error
    seconds: float | None = None  # the median of so many runs
    runs: int | None = None
    memory_bytes: int | None = None  # the peak beyond what was there: inputs and weights
    difference: float | None = None  # max |actual - expected| / max |expected| of the results
    asked_bytes: int | None = None  # the size of the tensor for which there was no memory
    note: str = ""  # the error, or why it is unavailable


def measure(
    trials: Mapping[str, Trial],
    which: str,
    device: torch.device,
    budget: float,
    tolerance: float = TOLERANCE,
) -> dict[str, Outcome]:
    """
    Run each once for its memory and its results, which have to be those of the first that fits into
    memory. Then all that passed take turns, for ``budget`` seconds all together and at least
    ``MIN_ROUNDS`` times, so that whatever else the machine does meets all alike.
    """
    outcomes: dict[str, Outcome] = {}
    seconds: dict[str, list[float]] = {}
    expected: list[Tensor] = []
    for name, trial in trials.items():
        try:
            results, first_seconds, memory_bytes = _first_run(trial, which, device)
        except (RuntimeError, MemoryError) as error:
            status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
            outcomes[name] = Outcome(
                status, asked_bytes=asked_bytes(error), note="" if status != FAILED else str(error)
            )
            continue
        expected = expected or results
        difference = relative_difference(results, expected)
        if not difference <= tolerance:  # NaN differs, too
            outcomes[name] = Outcome(DIFFERS, difference=difference)
            continue
        outcomes[name] = Outcome(MEASURED, memory_bytes=memory_bytes, difference=difference)
        seconds[name] = [first_seconds]
    expected.clear()

    timers = {
        name: _timer(trials[name], which, device, first_seconds)
        for name, (first_seconds,) in seconds.items()
        if first_seconds < SLOW_SECONDS
    }
    rounds, begin = 0, timer()
    while timers and (rounds < MIN_ROUNDS or timer() - begin < budget):
        for name, its_timer in timers.items():
            seconds[name] += its_timer()
        rounds += 1
    for name, times in seconds.items():
        outcomes[name] = replace(outcomes[name], seconds=statistics.median(times), runs=len(times))
    return outcomes


def _timer(
    trial: Trial, which: str, device: torch.device, first_seconds: float
) -> Callable[[], list[float]]:
    """Measures some runs; on a GPU by its own clock, so many in a row that it is never idle."""
    if device.type == "cuda":
        count = max(1, min(MAX_IN_A_ROW, int(MIN_SECONDS_IN_A_ROW / first_seconds)))
        return lambda: [cuda_seconds(lambda: trial.run(which), count)]
    run = Timer(
        "run(which)",
        globals={"run": trial.run, "which": which},
        num_threads=torch.get_num_threads(),
    )
    return lambda: run.blocked_autorange(min_run_time=0).times


def cuda_seconds(function: Callable[[], object], count: int) -> float:
    """The time of one of ``count`` calls in a row, between two CUDA events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / count


def relative_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """max |actual - expected| / max |expected|, the greatest over the pairs of tensors."""
    pairs = [(a.float(), e.float()) for a, e in zip(actual, expected)]
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or PyTorch raised it for want of memory."""
    return isinstance(error, MemoryError) or asked_bytes(error) is not None


def asked_bytes(error: BaseException) -> int | None:
    """The bytes that PyTorch says it tried to allocate, if it does."""
    found = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    return None if found is None else round(float(found[1]) * _UNITS[found[2]])


def _first_run(trial: Trial, which: str, device: torch.device) -> tuple[list[Tensor], float, int]:
    """The results, seconds and bytes of the first run that counts."""
    if device.type == "cuda":
        trial.run(which)  # libraries allocate their workspaces at the first call
    results: list[Tensor] = []
    seconds: list[float] = []

    def run() -> None:
        begin = timer()
        results.extend(trial.run(which))
        seconds.append(timer() - begin)

    memory_bytes = peak_memory(run, device)
    return results, seconds[0], memory_bytes
