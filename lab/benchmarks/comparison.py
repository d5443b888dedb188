"""A case, measured for several implementations, in a process with a memory limit."""

from __future__ import annotations

import gc
import multiprocessing
import re
import resource
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from lab.benchmarks.implementations import (
    IMPLEMENTATIONS,
    NAMES,
    PRECISIONS,
    Case,
    Implementation,
    build_all,
    embed,
    make_block,
    make_input,
)
from lab.benchmarks.measure import (
    FORWARD,
    FORWARD_BACKWARD,
    TOLERANCES,
    UNAVAILABLE,
    Outcome,
    Trial,
    measure,
)
from nl_detectron.layers import NonLocalBlock

# What is measured of the whole block, with its convolutions and norm, and of the operation alone.
BLOCK, OPERATION = "block", "operation"
PASSES = {BLOCK: (FORWARD, FORWARD_BACKWARD), OPERATION: (FORWARD_BACKWARD,)}

# Imported once, for all processes; those that are not installed are left out.
_PRELOAD = [
    "lab.benchmarks.comparison",
    "mmcv.cnn.bricks.non_local",
    "mmcv.cnn.bricks.context_block",
    "pytorchvideo.layers.nonlocal_net",
    "timm.layers.non_local_attn",
]
Result = TypeVar("Result")


class MeasuredPass(NamedTuple):
    """One implementation in one case; ``level`` and ``which`` as in ``PASSES``."""

    case: Case
    implementation: str
    level: str
    which: str
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        """All of it on one level, for JSON; sizes in bytes, times in seconds."""
        return {
            **asdict(self.case),
            "positions": self.case.positions,
            "implementation": self.implementation,
            "level": self.level,
            "pass": self.which,
            **asdict(self.outcome),
        }


def compare(
    case: Case,
    device: torch.device,
    budget: float,
    levels: Sequence[str] = tuple(PASSES),
    names: Sequence[str] = NAMES,
    passes: Mapping[str, Sequence[str]] = PASSES,
    implementations: Sequence[Implementation] = IMPLEMENTATIONS,
) -> list[MeasuredPass]:
    """Measure ``names`` in one case, with a budget for each level and pass. Whose operation cannot
    be taken out of the block has no row for it."""
    warnings.simplefilter("ignore")  # what other packages deprecate among themselves
    trials, reasons = make_trials(case, device, names, implementations)
    tolerance = TOLERANCES[case.precision]
    rows = [
        MeasuredPass(case, name, level, which, outcome)
        for level in levels
        for which in passes[level]
        for name, outcome in measure(trials[level], which, device, budget, tolerance).items()
    ]
    return rows + [
        MeasuredPass(case, name, BLOCK, which, Outcome(UNAVAILABLE, note=reason))
        for which in passes.get(BLOCK, ())
        for name, reason in reasons.items()
    ]


def make_trials(
    case: Case,
    device: torch.device,
    names: Sequence[str],
    implementations: Sequence[Implementation] = IMPLEMENTATIONS,
) -> tuple[dict[str, dict[str, Trial]], dict[str, str]]:
    """By level, what is measured of the implementations; and why some are left out."""
    dtype, tf32 = PRECISIONS[case.precision]
    # By default a GPU would round convolutions to 10 bits, and matrix products not.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    block = make_block(case).to(device)
    built, reasons = build_all(block, names, implementations)
    x = make_input(case).to(device)
    trials: dict[str, dict[str, Trial]] = {BLOCK: {}, OPERATION: {}}
    inputs: tuple[torch.Tensor, ...] = ()
    if isinstance(block, NonLocalBlock):
        with torch.no_grad():
            inputs = tuple(t.detach().to(dtype).requires_grad_() for t in embed(block, x))
        grad_y = torch.randn_like(inputs[0][..., : inputs[2].shape[2]])
    x = x.to(dtype).requires_grad_()
    grad_z = torch.randn_like(x)
    for name, (module, operation) in built.items():
        run = module if dtype == torch.float32 else torch.autocast(device.type, dtype)(module)
        trials[BLOCK][name] = Trial(run, (x,), grad_z, tuple(module.parameters()))
        if operation is not None:
            trials[OPERATION][name] = Trial(operation, inputs, grad_y)
    return trials, reasons


def run_limited(
    function: Callable[..., Result],
    *arguments: Any,
    device: torch.device,
    threads: int,
    memory_limit: int | None,
) -> Result:
    """``function(*arguments)`` in a process that may take ``memory_limit`` bytes more on ``device``
    than it starts with; on the CPU only Linux can do that. BrokenProcessPool: it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    limits = (device, threads, memory_limit)
    with ProcessPoolExecutor(1, context, initializer=_prepare, initargs=limits) as pool:
        return pool.submit(function, *arguments).result()


def available_memory() -> int:
    """The bytes that this machine has left; where it does not tell, more than any."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text() if meminfo.exists() else "")
    return 1024 * int(found[1]) if found else sys.maxsize


def _prepare(device: torch.device, threads: int, memory_limit: int | None) -> None:
    gc.freeze()  # collecting garbage among all that was imported takes long
    torch.set_num_threads(threads)
    if memory_limit is None:
        return
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit / total), device)
    elif sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory_limit += pages * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, hard))
