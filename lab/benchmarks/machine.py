"""What figures depend on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("nl_detectron", "torch", "mmcv-lite", "mmcv", "pytorchvideo", "timm", "mmsegmentation")


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures depend on: device, cores, threads, versions of packages, date."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = cpu[1] if cpu else platform.processor()
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The same in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['name']} ({machine['device']}), {machine['cores']} cores, "
        f"{machine['threads']} threads, {versions}, {machine['date'][:10]}"
    )
