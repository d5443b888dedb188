"""The operation and the block at the sizes of a detector, in each precision."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lab.benchmarks.comparison import BLOCK, OPERATION, compare, make_trials
from lab.benchmarks.gpu.kernels import FLEX, KERNEL_NAMES, KERNELS
from lab.benchmarks.implementations import (
    IMPLEMENTATIONS,
    OURS,
    PRECISIONS,
    TEXTBOOK,
    Case,
    Implementation,
)
from lab.benchmarks.measure import FORWARD, FORWARD_BACKWARD, cuda_seconds

PASSES = {BLOCK: (FORWARD, FORWARD_BACKWARD), OPERATION: (FORWARD, FORWARD_BACKWARD)}
# The most telling first: when the time is over, the rest is left out.
PLACES = (
    *(("res4", "embeddings"), ("res3", "none"), ("res5", "none")),
    *(("res4", "none"), ("res3", "embeddings"), ("res5", "embeddings")),
)
FUNCTIONS = ("embedded_gaussian", "dot_product", "concatenation", "gaussian")
SOFTMAX = ("embedded_gaussian", "gaussian")
PRECISION_ORDER = ("bf16", "fp32", "fp16", "tf32")
PEERS = (OURS, TEXTBOOK, "mmcv", "PyTorchVideo", "timm")
BATCH, QUICK_SIZE = 2, (64, 96)
# Seconds in which the implementations take turns, for each level and pass of a case.
BUDGET, QUICK_BUDGET = 0.05, 0.0
_PEAK_SIZE, _QUICK_PEAK_SIZE = 8192, 128

Row = dict[str, Any]


def peaks(device: torch.device, quick: bool) -> Row:
    """FLOP/s of a plain product of two square matrices in each precision."""
    size, found = _QUICK_PEAK_SIZE if quick else _PEAK_SIZE, {}
    for name, (dtype, tf32) in PRECISIONS.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x = torch.randn(size, size, device=device, dtype=dtype)
        found[name] = 2 * size**3 / min(_seconds(lambda x=x: x @ x, device) for _ in range(3))
    return {"kind": "peaks", "size": size, "flops_per_second": found}


def _seconds(function: Any, device: torch.device) -> float:
    function()
    if device.type == "cuda":
        return cuda_seconds(function, 5)
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@functools.cache
def flops(case: Case) -> dict[str, dict[str, int]]:
    """By level and pass, twice the multiply-adds of the N x N form, of the dot product of ours,
    which needs fewer; nothing for the concatenation, which needs no products."""
    if case.pairwise == "concatenation":
        return {}
    name = OURS if case.pairwise == "dot_product" else TEXTBOOK
    trials, _ = make_trials(case, torch.device("meta"), [name])
    counts: dict[str, dict[str, int]] = {level: {} for level in PASSES}
    for level, which in itertools.product(PASSES, (FORWARD, FORWARD_BACKWARD)):
        with _FlopCounter() as counter:
            trials[level][name].run(which)
        counts[level][which] = counter.flops
    return counts


class _FlopCounter(TorchDispatchMode):
    """PyTorch's ``FlopCounterMode``, which knows modules, does not count ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def block_cases(quick: bool) -> Iterator[tuple[Case, Sequence[str]]]:
    """The cases of the section "block", and who takes part."""
    for case in _cases(FUNCTIONS[1:2] if quick else FUNCTIONS, quick):
        yield case, PEERS


def kernel_cases(quick: bool) -> Iterator[tuple[Case, Sequence[str]]]:
    """The cases of the section "softmax". FlexAttention, which compiles for long, comes last."""
    eager = [name for name in KERNEL_NAMES if name != FLEX]
    for case in _cases(SOFTMAX[:1] if quick else SOFTMAX, quick):
        yield case, eager
    for case in itertools.islice(_cases(SOFTMAX, quick), 1 if quick else 3):
        yield case, (OURS, FLEX)


def _cases(functions: Sequence[str], quick: bool) -> Iterator[Case]:
    """With ``quick`` the first of each function, small."""
    for pairwise in functions:
        for precision in PRECISION_ORDER[: 1 if quick else None]:
            for stage, subsample in PLACES[: 1 if quick else None]:
                size = QUICK_SIZE if quick else Case.image_size
                yield Case(stage, pairwise, subsample, BATCH, size, precision)


def measure_cases(
    section: str, device: torch.device, quick: bool, deadline: float
) -> Iterator[Row]:
    """What is measured of the section "block" or "softmax", and what there was no time for."""
    yield peaks(device, quick)
    is_block = section == "block"
    passes = PASSES if is_block else {OPERATION: PASSES[OPERATION]}
    implementations: Sequence[Implementation] = IMPLEMENTATIONS if is_block else KERNELS
    budget = QUICK_BUDGET if quick else BUDGET
    for case, names in (block_cases if is_block else kernel_cases)(quick):
        what = f"{case}, {case.precision}" + (f": {FLEX}" if FLEX in names else "")
        if time.monotonic() > deadline:
            yield {"kind": "left out", "what": what, "why": "no time left"}
            continue
        counts = flops(replace(case, precision="fp32"))  # all have as many
        try:
            rows = compare(
                *(case, device, budget, tuple(passes), names),
                passes=passes,
                implementations=implementations,
            )
        except RuntimeError as error:  # out of memory, or worse, before anything was measured
            yield {"kind": "left out", "what": what, "why": str(error).splitlines()[0]}
            continue
        for row in rows:
            count = counts.get(row.level, {}).get(row.which)
            yield {"kind": "outcome", **row.as_dict(), "flops": count}
        if device.type == "cuda":
            torch.cuda.empty_cache()
