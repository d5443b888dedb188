"""Modules of packages that are installed without what they depend on."""

from __future__ import annotations

from types import ModuleType

import pytest

from lab.benchmarks import peers


def mmsegmentation() -> tuple[ModuleType, ModuleType]:
    """As :func:`lab.benchmarks.peers.mmsegmentation`; without the package the test is skipped."""
    try:
        return peers.mmsegmentation()
    except ImportError as error:
        pytest.skip(f"needs mmcv and mmsegmentation: {error}")
