"""The balanced feature pyramid of "Libra R-CNN" (https://arxiv.org/abs/1904.02701)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class BalancedPyramid(nn.Module):
    """
    What Section 3.2 does to the levels of a feature pyramid: all are brought to the size of one of
    them, averaged, refined, brought back to their sizes and added to the levels.
    """

    def __init__(self, refine: nn.Module, level: str) -> None:
        """
        Args:
            refine: a block, which keeps the shape; as published, a non-local one with
                ``reduction=1, scale=False, norm=""``.
            level: the name of the level whose size it works at; as published, that of stride 16.
        """
        super().__init__()
        self.refine = refine
        self.level = level

    def forward(self, levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Args:
            levels: by name, (B, C, H, W) each, H and W their own.

        Returns:
            The same names and shapes.
        """
        size = levels[self.level].shape[2:]
        mean = torch.stack([_resized(x, size) for x in levels.values()]).mean(0)
        refined = self.refine(mean)
        return {name: x + _resized(refined, x.shape[2:]) for name, x in levels.items()}


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Smaller by max-pooling, larger by repetition (equation 4's "interpolation")."""
    if x.shape[2] > size[0] or x.shape[3] > size[1]:
        return functional.adaptive_max_pool2d(x, size)
    return functional.interpolate(x, size, mode="nearest")
