"""A block as the conversion holds it, between reading and writing: in our terms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nl_detectron.weights.report import ConversionError

BATCH_NORMS = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN")
# Epsilon of the batch norms that get_norm makes.
OUR_EPS = 1e-5
# DNL's, which only "disentangled" has a use for.
PUBLISHED_TEMPERATURE = 0.05
AFFINE_NOTE = "no statistics in the file: multiplication and addition only"


class Traits(NamedTuple):
    """
    What a block computes, in the words of :class:`NonLocalBlock`'s arguments; of a
    :class:`GlobalContextBlock`, ``pairwise`` is "global_context".
    """

    pairwise: str
    scale: bool
    subsample: str
    norm: str
    temperature: float = PUBLISHED_TEMPERATURE


_UNKNOWN = Traits("", False, "", "")


@dataclass
class Block:
    """
    Attributes:
        prefix: its name in the file; empty at the root.
        tensors: by the names of our block's state dict; reading changes them so that our block
            computes what the file's did.
        origins: the names of the file's tensors, by ours.
        parts: the implementation's names of the parts that it has, by ours.
        faults: why it cannot be converted.
        notes: by our names, how a tensor was changed, or why it is in ``origins`` only.
        traits: what it computes, once it is read.
        in_channels, inner_channels: C and d.
        dims: of the convolutions.
    """

    prefix: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    traits: Traits = _UNKNOWN

    @property
    def is_context(self) -> bool:
        """Is it a global context block?"""
        return "reduce" in self.parts

    @property
    def embedding(self) -> str:
        """The convolution that tells the sizes: g, or W_1 of a global context block."""
        return "reduce" if self.is_context else "g"

    @property
    def in_channels(self) -> int:
        return self.tensors[f"{self.embedding}.weight"].shape[1]

    @property
    def inner_channels(self) -> int:
        return self.tensors[f"{self.embedding}.weight"].shape[0]

    @property
    def dims(self) -> int:
        return self.tensors[f"{self.embedding}.weight"].dim() - 2

    def change(self, name: str, tensor: Tensor, note: str) -> None:
        """
        Args:
            name: of the tensor, in our words.
            tensor: its new value.
            note: added to what the table says of it.
        """
        self.tensors[name] = tensor
        self.notes[name] = "; ".join(filter(None, (self.notes.get(name), note)))


def affine_statistics(weight: Tensor) -> dict[str, Tensor]:
    """
    Args:
        weight: (C,), the factors of an affine layer, a multiplication and an addition.

    Returns:
        The statistics with which a frozen batch norm computes the same: mean 0, variance 1 - eps.
    """
    return {
        "running_mean": torch.zeros_like(weight),
        "running_var": torch.full_like(weight, 1 - OUR_EPS),
    }


def common_reduction(blocks: Iterable[Block]) -> int:
    """
    Args:
        blocks: of C channels with d inside, each of its own.

    Returns:
        The largest ``reduction`` for which C // reduction is d in all of them.

    Raises:
        ConversionError: there is none.
    """
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
