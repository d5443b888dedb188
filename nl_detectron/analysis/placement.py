"""Where the cells of a feature map lie in the image that a detector was given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

# Both in pixels.
Point = tuple[float, float]  # x, y
Box = tuple[float, float, float, float]  # left, top, right, bottom

_TOLERANCE = 1e-6  # pixels; what scaling there and back may add


@dataclass(frozen=True)
class Axis:
    """
    Cells of equal size along one axis of an image, from ``start`` to ``stop``, in pixels.
    Coordinates are continuous, as those of Detectron2's boxes: the first pixel covers [0, 1), and
    of an axis that starts at 0 cell i covers [i, i + 1) times the stride, as for Detectron2's
    aligned RoIAlign. Where the input was mirrored, ``start`` is greater than ``stop``.
    """

    start: float
    stop: float
    cells: int

    @property
    def edges(self) -> np.ndarray:
        """(cells + 1,) borders of the cells, in the order of the cells."""
        return np.linspace(self.start, self.stop, self.cells + 1)

    def contains(self, position: float) -> bool:
        """Whether a position in pixels lies on the axis, its ends included."""
        return min(self.start, self.stop) <= position <= max(self.start, self.stop)

    def cell_at(self, position: float) -> int:
        """The number of the cell at a position, in pixels, that the axis contains."""
        cell = math.floor((position - self.start) / (self.stop - self.start) * self.cells)
        return min(cell, self.cells - 1)  # the far border belongs to the last cell

    def visible(self, size: int) -> np.ndarray:
        """
        The cells (n,) that overlap an image of ``size`` pixels along this axis, from left to right,
        or from top to bottom, in it.
        """
        edges = self.edges
        low, high = np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:])
        cells = np.flatnonzero((high > _TOLERANCE) & (low < size - _TOLERANCE))
        return cells if self.start < self.stop else cells[::-1]

    def span(self, cells: int | np.ndarray) -> tuple[float, float]:
        """The least and the greatest position, in pixels, that neighbouring cells cover."""
        borders = self.edges[[np.min(cells), np.max(cells) + 1]]
        return float(borders.min()), float(borders.max())

    def of_keys(self, keys: int) -> Axis:
        """
        The axis of keys, as many as cells, or, max-pooled by 2, half as many; the last of an odd
        number of pooled cells has none.
        """
        cells = keys if keys == self.cells else 2 * keys
        return Axis(self.start, self.start + (self.stop - self.start) * cells / self.cells, keys)


@dataclass(frozen=True)
class PlacedFeatures:
    """A feature map x (1, C, rows, columns), and where its rows and columns lie in the image."""

    x: Tensor
    rows: Axis
    columns: Axis

    @property
    def area(self) -> float:
        """In square pixels."""
        return abs((self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start))

    def contains(self, point: Point) -> bool:
        """Whether a point of the image lies on the features, their border included."""
        return self.columns.contains(point[0]) and self.rows.contains(point[1])

    def cell_at(self, point: Point) -> tuple[int, int]:
        """Row and column of the cell at a point that the features contain."""
        return self.rows.cell_at(point[1]), self.columns.cell_at(point[0])

    def cell_box(self, cell: tuple[int, int]) -> Box:
        """The rectangle that a cell (row and column) covers in the image."""
        (top, bottom), (left, right) = self.rows.span(cell[0]), self.columns.span(cell[1])
        return left, top, right, bottom


def place(x: Tensor, box: np.ndarray) -> PlacedFeatures:
    """A feature map (1, C, rows, columns) between the outer corners of its first and last cell,
    ``box`` (4,), in pixels of the image."""
    left, top, right, bottom = box.round(6).tolist()
    rows, columns = x.shape[2:]
    return PlacedFeatures(x, Axis(top, bottom, rows), Axis(left, right, columns))


def grid_stride(input_size: tuple[int, int], grid: tuple[int, int]) -> int:
    """Of a feature map, for a backbone's input of this height and width: a power of 2, as in
    Detectron2's poolers, that need not divide the input."""
    ratio = max(size / cells for size, cells in zip(input_size, grid))
    return 2 ** math.ceil(math.log2(ratio))
