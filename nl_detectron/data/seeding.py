"""Random numbers that are a function of a key alone, such as a seed and an iteration."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_generators(*key: int | str) -> None:
    """Seed Python's, NumPy's and torch's global generators, CUDA's, too, by what the key says."""
    seed_cpu_generators(*key)
    # torch.manual_seed would note where it was called, in milliseconds, where there is no CUDA.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(_hash(*key))


def seed_cpu_generators(*key: int | str) -> None:
    """Seed the global generators, all but CUDA's, by what the key says."""
    value = _hash(*key)
    random.seed(value)
    np.random.seed(divmod(value, 1 << 32))
    torch.default_generator.manual_seed(value)


@contextlib.contextmanager
def cpu_generators_kept() -> Iterator[None]:
    """Restore the global generators, all but CUDA's, at the end of the ``with``."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def random_state(*key: int | str) -> np.random.RandomState:
    """A generator seeded by what the key says; NumPy never changes what its legacy one draws."""
    high, low = divmod(_hash(*key), 1 << 32)
    return np.random.RandomState([high, low])


def _hash(*key: int | str) -> int:
    """64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
