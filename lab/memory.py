"""The memory that a computation needs at its peak."""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_CPU = 0  # in a trace, c10::DeviceType


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """
    The most bytes that PyTorch's allocator holds at a time for a call, beyond what is held before
    it: not the weights and inputs, nor what libraries allocate past PyTorch. On CUDA, let it run
    once before: libraries allocate their workspaces at the first call.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what is freed while it is measured should be its own
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library would log its steps
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return max(itertools.accumulate(_allocations(profiler), initial=0))


def _allocations(profiler: profile) -> list[int]:
    """The sizes in bytes of what was allocated, negative where it was freed, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_bytes())["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]"]
    memory.sort(key=lambda event: event["ts"])
    return [e["args"]["Bytes"] for e in memory if e["args"]["Device Type"] == _CPU]
