"""What one point attends to, and several points in several blocks: plain data to draw from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from nl_detectron.analysis.placement import Box, Point


@dataclass(frozen=True)
class AttentionMap:
    """
    What one point attends to in one block: the weights f(x_i, x_j) / C(x) of Eq. 1.

    Attributes:
        weights: (rows, columns) float32, of the keys whose cells overlap the image, as they lie
            in it: from left to right and top to bottom.
        extent: the rectangle that these cells cover, in pixels. It may reach over the image's
            borders, and falls short of them where a pooled grid of odd size has no key.
        query: the cell of the block's input that the point lies in.
        outside: the share, 0 to 1, of the sum of the weights' magnitudes that is on keys in
            the padding, which are not in ``weights``.
        keys: the number of all keys, those in the padding included. A pyramid's bins are spread
            over their cells, which then count as keys.
    """

    weights: np.ndarray
    extent: Box
    query: Box
    outside: float
    keys: int

    def strongest(self, count: int) -> list[tuple[Point, float]]:
        """
        The places that the point attends to most: the peaks of the map, which are cells not
        weaker than any of their 8 neighbours, and not 0.

        Args:
            count: how many, at most.

        Returns:
            The centre, in pixels, and the weight of each, the greatest magnitude first.
        """
        magnitude = torch.from_numpy(np.abs(self.weights))[None]
        peaks = (magnitude == functional.max_pool2d(magnitude, 3, 1, 1)) & (magnitude > 0)
        cells = np.argwhere(peaks[0].numpy())
        weights = self.weights[tuple(cells.T)]
        left, top, right, bottom = self.extent
        height, width = self.weights.shape
        x = left + (cells[:, 1] + 0.5) * (right - left) / width
        y = top + (cells[:, 0] + 0.5) * (bottom - top) / height
        order = np.argsort(-np.abs(weights), kind="stable")[:count]
        return [((float(x[i]), float(y[i])), float(weights[i])) for i in order]


@dataclass(frozen=True)
class BlockAttention:
    """
    Attributes:
        name: the block's full name, such as ``backbone.res4.nonlocal4``.
        pairwise: its kind of weights in :data:`nl_detectron.layers.ATTENTION`, such as
            ``embedded_gaussian``.
        maps: a map for each point; None where the block does not see the point: those of a head
            see the boxes of detected objects only.
    """

    name: str
    pairwise: str
    maps: list[AttentionMap | None]


@dataclass(frozen=True)
class AttentionMaps:
    """
    Attributes:
        image: (H, W, 3) uint8, RGB.
        points: x, y in pixels.
        blocks: what the points attend to in each of the blocks.
    """

    image: np.ndarray
    points: list[Point]
    blocks: list[BlockAttention]
