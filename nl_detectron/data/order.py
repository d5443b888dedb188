"""Which images make the batch of each iteration, as a function of the seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)

from nl_detectron.data.seeding import random_state


@dataclass(frozen=True)
class BatchOrder:
    """The endless stream of batches, as indices into the dataset. Every epoch has an order of its
    own; an image waits until there is a batch of its kind, wide or not."""

    repeats: np.ndarray  # (N,), how often an image comes in an epoch; a fraction is a chance
    is_wide: np.ndarray  # (N,) bool; a batch has images of one kind only
    batch_size: int
    seed: int
    shuffle: bool = True  # without it, an epoch is in the order of the dataset
    block_size: int = 1 << 16  # epochs of a small dataset are drawn together, up to so many images

    def batches(self, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the batches, (B,) int64 each, from an iteration on; those before it cost next to
        nothing."""
        waiting = [np.empty(0, np.int64)] * 2
        number = 0
        for block in itertools.count():
            indices = self._epochs(block)
            full, ends = [], []
            for kind in (0, 1):
                places = np.flatnonzero(self.is_wide[indices] == kind)
                num_waiting = len(waiting[kind])
                queue = np.concatenate([waiting[kind], indices[places]])
                end = len(queue) // self.batch_size * self.batch_size
                full.append(queue[:end].reshape(-1, self.batch_size))
                # A batch comes when its last image does.
                last = np.arange(self.batch_size - 1, end, self.batch_size)
                ends.append(places[last - num_waiting])
                waiting[kind] = queue[end:]
            batches = np.concatenate(full)[np.argsort(np.concatenate(ends))]
            yield from batches[max(start - number, 0) :]
            number += len(batches)

    def _epochs(self, block: int) -> np.ndarray:
        """The images of a block of epochs, in order."""
        images = np.flatnonzero(self.repeats)
        num_epochs = max(1, self.block_size // len(images))
        rng = random_state(self.seed, "epochs", block)
        floor = np.floor(self.repeats[images])
        chance = rng.random_sample((num_epochs, len(images)))
        times = (floor + (chance < self.repeats[images] - floor)).astype(np.int64).ravel()
        indices = np.repeat(np.tile(images, num_epochs), times)
        if not self.shuffle:
            return indices
        epoch = np.repeat(np.arange(num_epochs * len(images)) // len(images), times)
        return indices[np.argsort(epoch + rng.random_sample(len(indices)))]  # equal keys: never


def repeats_of(sampler: Any, size: int, seed: int) -> np.ndarray:
    """How often each image comes in an epoch of one of Detectron2's samplers (None is a
    ``TrainingSampler``): (N,) float64. ``seed`` draws the subset of a
    ``RandomSubsetTrainingSampler``."""
    # The samplers tell what they were made with in private attributes only.
    if isinstance(sampler, RepeatFactorTrainingSampler):
        return (sampler._int_part + sampler._frac_part).double().numpy()
    if isinstance(sampler, RandomSubsetTrainingSampler):
        order = random_state(seed, "subset").random_sample(size).argsort(kind="stable")
        return (order.argsort() < sampler._size_subset).astype(float)
    if sampler is None or type(sampler) is TrainingSampler:
        return np.ones(size)
    raise ValueError(f"The training sampler is a {type(sampler).__name__}, which is not known here")


def is_shuffled(sampler: Any) -> bool:
    """Whether an epoch of the sampler has an order of its own."""
    return getattr(sampler, "_shuffle", True)
