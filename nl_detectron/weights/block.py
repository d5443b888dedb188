"""A block as the conversion holds it, between reading and writing: in our terms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nl_detectron.weights.conversion import ConversionError

# The convolutions, with their channels out and in: C of the block, d inside, D = 2 d.
CONVS = {
    **{"theta": "dC", "phi": "dC", "g": "dC", "concat": "1D", "unary": "1C", "out": "Cd"},
    **{"context": "1C", "reduce": "dC"},
}
BATCH_NORMS = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN")
# Epsilon of the batch norms that get_norm makes.
OUR_EPS = 1e-5
# DNL's, which only "disentangled" has a use for.
PUBLISHED_TEMPERATURE = 0.05
AFFINE_NOTE = "no statistics in the file: multiplication and addition only"


class Traits(NamedTuple):
    """What a block computes, as NonLocalBlock's arguments say it, or by "global_context"."""

    pairwise: str
    scale: bool
    subsample: str
    norm: str
    temperature: float = PUBLISHED_TEMPERATURE


_UNKNOWN = Traits("", False, "", "")


@dataclass
class Block:
    """A block; its dicts are by our names. Reading changes the tensors so that ours is the same."""

    prefix: str  # its name in the file; "" at the root
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)  # their names in the file
    notes: dict[str, str] = field(default_factory=dict)  # how or why they were changed or left out
    parts: dict[str, str] = field(default_factory=dict)  # the implementation's names of them
    pooled: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)  # why it cannot be converted
    traits: Traits = _UNKNOWN  # this and the next are set when it is read
    dims_in_file: int = 0

    @property
    def title(self) -> str:
        return self.prefix or "the block"

    @property
    def is_context(self) -> bool:
        return "reduce" in self.parts

    @property
    def embedding(self) -> str:
        """The convolution that tells the sizes: g, or W_1 of a global context block."""
        return "reduce" if self.is_context else "g"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the embedding's weight: (channels inside, channels, *kernel)."""
        return tuple(self.tensors[f"{self.embedding}.weight"].shape)

    @property
    def in_channels(self) -> int:
        return self.shape[1]

    @property
    def inner_channels(self) -> int:
        return self.shape[0]

    @property
    def is_affine(self) -> bool:
        """Is its norm one multiplication and addition per channel?"""
        return self.traits.norm == "FrozenBN" and "norm.running_var" not in self.tensors

    def change(self, name: str, tensor: Tensor, note: str) -> None:
        """Give a tensor, in our words, a new value; the note is added to what is said of it."""
        self.tensors[name] = tensor
        self.notes[name] = "; ".join(filter(None, (self.notes.get(name), note)))

    def multiply_theta(self, factor: float, note: str) -> None:
        for name in ("theta.weight", "theta.bias"):
            self.change(name, self.tensors[name] * factor, note)


def affine_statistics(weight: Tensor) -> dict[str, Tensor]:
    """The statistics with which a frozen batch norm multiplies by its weight (C,) and adds only."""
    return {
        "running_mean": torch.zeros_like(weight),
        "running_var": torch.full_like(weight, 1 - OUR_EPS),
    }


def common_reduction(blocks: Iterable[Block]) -> int:
    """The largest reduction for which C // reduction is the inner width in all blocks."""
    low, high, widths = 1, 2**31, []
    for block in blocks:
        channels, inner = block.in_channels, block.inner_channels
        low, high = max(low, channels // (inner + 1) + 1), min(high, channels // inner)
        widths.append(f"{inner} of {channels}")
    if low > high:
        raise ConversionError(
            "no integer reduction gives the inner channels that the blocks have: "
            + ", ".join(dict.fromkeys(widths))
        )
    return high
