"""Running a measurement in a process of its own, which may not take more memory than allowed."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from nl_detectron.benchmark.measure import is_out_of_memory

if sys.platform != "win32":
    import resource

Result = TypeVar("Result")


class ChildError(Exception):
    """The process could not do its work; the message says why."""


# Imported once, for all processes; those that are not installed are left out.
_PRELOAD = [
    "nl_detectron.benchmark.comparison",
    "mmcv.cnn.bricks.non_local",
    "pytorchvideo.layers.nonlocal_net",
    "timm.layers.non_local_attn",
]
_CPU_LIMIT = 8 * 2**30
_SHARE_OF_AVAILABLE = 0.8


def run_in_child(
    function: Callable[..., Result],
    *arguments: Any,
    device: torch.device,
    threads: int,
    memory_limit: int | None,
) -> Result:
    """
    ``function(*arguments)`` in a process of its own.

    Args:
        function: one at the top of a module; arguments and result have to be picklable.
        device: which ``memory_limit`` is for.
        threads: of PyTorch on the CPU.
        memory_limit: bytes that the process may take beyond what it holds at its start. PyTorch
            raises an error at the allocation that goes beyond. On the CPU only Linux can do that.

    Raises:
        ChildError: the process was killed, or its memory did not do for the inputs.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    with ProcessPoolExecutor(1, context) as pool:
        call = pool.submit(_run, function, arguments, device, threads, memory_limit)
        try:
            return call.result()
        except BrokenProcessPool as error:
            raise ChildError("the process was killed, probably for want of memory") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ChildError("the memory limit leaves too little to measure anything") from error


def default_memory_limit(device: torch.device) -> int | None:
    """
    On the CPU 8 GiB, or 80 % of what is available where that is less. A GPU has a limit of its
    own, which does no harm to others.
    """
    if device.type == "cuda":
        return None
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return _CPU_LIMIT
    (line,) = (li for li in meminfo.read_text().splitlines() if li.startswith("MemAvailable:"))
    return min(_CPU_LIMIT, int(_SHARE_OF_AVAILABLE * int(line.split()[1]) * 1024))


def _run(
    function: Callable[..., Result],
    arguments: tuple[Any, ...],
    device: torch.device,
    threads: int,
    memory_limit: int | None,
) -> Result:
    gc.freeze()  # collecting garbage among all that was imported takes long
    torch.set_num_threads(threads)
    # On a GPU, convolutions would be rounded to 10 bits by default, matrix products not.
    torch.backends.cudnn.allow_tf32 = False
    if memory_limit is not None:
        _limit_memory(device, memory_limit)
    return function(*arguments)


def _limit_memory(device: torch.device, limit: int) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    elif sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit += pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
