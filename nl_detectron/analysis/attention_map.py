"""What counts for one point, and for several points in several blocks: plain data to draw from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from nl_detectron.analysis.placement import Box, Point


@dataclass(frozen=True)
class AttentionMap:
    """
    What counts for one point in one block: the weights f(x_i, x_j) / C(x) of Eq. 1, contributions
    or an effect.

    Attributes:
        values: (rows, columns) float32, of the keys whose cells overlap the image, as they lie
            in it: from left to right and top to bottom.
        extent: the rectangle that these cells cover, in pixels. It may reach over the image's
            borders, and falls short of them where a pooled grid of odd size has no key.
        query: the cell of the block's input that the point lies in; for the effect on a score, the
            object's box.
        outside: the share, 0 to 1, of the sum of the magnitudes that is on keys in the padding,
            which are not in ``values``.
        keys: the number of all keys, those in the padding included. A pyramid's bins are spread
            over their cells, which then count as keys.
    """

    values: np.ndarray
    extent: Box
    query: Box
    outside: float
    keys: int

    @property
    def mean(self) -> float:
        """The mean magnitude over all keys: an even share of weights that have a fixed sum."""
        total_seen = np.abs(self.values).sum(dtype=np.float64)
        return float(total_seen / self.keys / max(1 - self.outside, 1e-12))

    @property
    def multiples(self) -> np.ndarray:
        """(rows, columns): the values divided by the mean; ones where that is 0."""
        return self.values / self.mean if self.mean else np.ones_like(self.values)

    @property
    def centers(self) -> np.ndarray:
        """(rows, columns, 2): x and y of each place's centre, in pixels."""
        left, top, right, bottom = self.extent
        rows, columns = self.values.shape
        x = left + (np.arange(columns) + 0.5) * ((right - left) / columns)
        y = top + (np.arange(rows) + 0.5) * ((bottom - top) / rows)
        return np.stack(np.meshgrid(x, y), axis=2)

    @property
    def is_highest_at_query(self) -> bool:
        """Whether the greatest magnitude is at the point itself, in its cell or a neighbour."""
        return bool(self._at_query.flat[np.abs(self.values).argmax()])

    def leaves_out_a_strip(self, image_size: tuple[int, int]) -> bool:
        """Whether a part of the image, (width, height), narrower than a cell has no key."""
        strip = np.array(image_size) - self.extent[2:]
        return bool(((strip > 0.5) & (strip < self._cell_size)).any())

    @property
    def _cell_size(self) -> np.ndarray:
        left, top, right, bottom = self.extent
        return np.array([right - left, bottom - top]) / self.values.shape[::-1]

    @property
    def _at_query(self) -> np.ndarray:
        """(rows, columns): the cell of the point and its neighbours."""
        from_query = np.abs(self.centers - np.reshape(self.query, (2, 2)).mean(0))
        return (from_query <= 1.5 * self._cell_size).all(2)

    def strongest(self, count: int) -> list[tuple[Point, float]]:
        """
        The places that count most for the point: the peaks of the map, which are cells not weaker
        than any of their 8 neighbours. Those at the point itself, in its cell or a neighbour of it,
        and those with less than a hundredth of the greatest magnitude are left out. The centre, in
        pixels, and the value of each, the greatest magnitude first, of ``count`` at most.
        """
        magnitude = torch.from_numpy(np.abs(self.values))[None]
        peaks = magnitude == functional.max_pool2d(magnitude, 3, 1, 1)
        peaks &= (magnitude > 0) & (magnitude >= magnitude.max() / 100)
        chosen = peaks[0].numpy() & ~self._at_query
        places, values = self.centers[chosen].tolist(), self.values[chosen]
        order = np.argsort(-np.abs(values), kind="stable")[:count]
        return [((places[i][0], places[i][1]), float(values[i])) for i in order]


@dataclass(frozen=True)
class BlockAttention:
    """
    What counts for several points in one block: a map for each, None where the block does not see
    it, as those of a head see the boxes of detected objects only. ``pairwise`` is its kind of
    weights in :data:`nl_detectron.layers.ATTENTION`.
    """

    name: str
    pairwise: str
    maps: list[AttentionMap | None]


@dataclass(frozen=True)
class AttentionMaps:
    """
    What counts for several points, x, y in pixels, of an image (H, W, 3), uint8, RGB, in several
    blocks; ``what`` is one of :data:`nl_detectron.analysis.contribution.WHAT`.
    """

    image: np.ndarray
    points: list[Point]
    blocks: list[BlockAttention]
    what: str = "weights"
