"""What a detector's blocks were given for an image, and the maps that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nl_detectron.analysis.attention_map import AttentionMap, AttentionMaps, BlockAttention
from nl_detectron.analysis.contribution import ON_GRID, WHAT, effect_on_grid
from nl_detectron.analysis.placement import Box, PlacedFeatures, Point
from nl_detectron.layers import AttentionBlock
from nl_detectron.validation import check_choice

Cells = Sequence[tuple[int, int]]
"""Rows and columns."""


@dataclass(frozen=True)
class AttentionRecord:
    """
    An image and what a detector's non-local blocks were given for it, ready to be asked.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        boxes: (N, 4) of the detected objects, the most confident first, in pixels.
        blocks: the blocks by their full names.
        features: what each was given: a map of the whole image, or for the blocks of a mask or
            keypoint head, one for the box of each detected object.
        scores: (N,) of the objects, with the graph that leads to them, where effects are recorded.
        outputs: what each block gave, less those of heads, which have no part in the scores.
    """

    image: np.ndarray
    boxes: np.ndarray
    blocks: dict[str, AttentionBlock]
    features: dict[str, list[PlacedFeatures]]
    scores: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def maps(self, points: Sequence[Point], what: str = "weights") -> AttentionMaps:
        """
        For each block a map for each of the points, x, y in pixels of the image, whose upper left
        corner is 0, 0. A point in several objects' boxes is asked in the smallest.

        Args:
            what: "weights", what the points attend to; "contributions", what each place adds to
                them (:func:`nl_detectron.analysis.contribution.contributions_on_grid`); or
                "effect", :meth:`effects`.

        Raises:
            ValueError: a point lies outside the image, or effects are asked for and were not
                recorded.
        """
        check_choice("what", what, WHAT)
        if what == "effect":
            return self.effects(points)
        check_points(points, self.image)
        blocks = [
            BlockAttention(name, block.pairwise, self._maps_of_block(name, points, what))
            for name, block in self.blocks.items()
        ]
        return AttentionMaps(self.image, list(points), blocks, what)

    def effects(self, points: Sequence[Point]) -> AttentionMaps:
        """
        The effect of each place on the score of the object that a point is in
        (:func:`nl_detectron.analysis.contribution.effect_on_grid`), of several the smallest: for
        each block outside of the heads a map for each point, as :meth:`maps`.
        """
        check_points(points, self.image)
        if self.scores is None:
            raise ValueError("no effects are recorded: call record_attention with effects=True")
        objects = [self._smallest_object(point) for point in points]
        blocks = [
            BlockAttention(name, block.pairwise, [o and self._effect(name, *o) for o in objects])
            for name, block in self.blocks.items()
            if name in self.outputs
        ]
        return AttentionMaps(self.image, list(points), blocks, "effect")

    def ask(
        self, name: str, features: PlacedFeatures, cells: Cells, what: str = "weights"
    ) -> list[AttentionMap]:
        """
        A map for each cell, row and column, of some of a block's :attr:`features`, of "weights" or
        "contributions".
        """
        values = ON_GRID[what](self.blocks[name], features.x, cells)
        return self._placed(features, values, [features.cell_box(cell) for cell in cells])

    def _placed(
        self, features: PlacedFeatures, on_grid: Tensor, queries: Sequence[Box]
    ) -> list[AttentionMap]:
        """A map of each (key rows, key columns), what lies in the image of it."""
        values = on_grid.cpu().numpy()
        rows = features.rows.of_keys(values.shape[1])
        columns = features.columns.of_keys(values.shape[2])
        height, width = self.image.shape[:2]
        rows_seen, columns_seen = rows.visible(height), columns.visible(width)
        (top, bottom), (left, right) = rows.span(rows_seen), columns.span(columns_seen)
        seen = values[:, rows_seen[:, None], columns_seen]
        total = np.abs(values).sum((1, 2), dtype=np.float64)
        total_seen = np.abs(seen).sum((1, 2), dtype=np.float64)
        outside = (total - total_seen) / np.where(total, total, 1)
        extent, keys = (left, top, right, bottom), values[0].size
        return [
            AttentionMap(*of_query, keys)
            for of_query in zip(seen, [extent] * len(seen), queries, outside.tolist())
        ]

    def _maps_of_block(
        self, name: str, points: Sequence[Point], what: str
    ) -> list[AttentionMap | None]:
        maps: list[AttentionMap | None] = [None] * len(points)
        smallest_first = sorted(self.features[name], key=lambda features: features.area)
        for features in smallest_first:
            mine = [i for i, p in enumerate(points) if maps[i] is None and features.contains(p)]
            if mine:
                cells = [features.cell_at(points[i]) for i in mine]
                for i, attention_map in zip(mine, self.ask(name, features, cells, what)):
                    maps[i] = attention_map
        return maps

    def _effect(self, name: str, score: Tensor, box: Box) -> AttentionMap:
        (features,) = self.features[name]
        (gradient,) = torch.autograd.grad(
            score, self.outputs[name], retain_graph=True, materialize_grads=True
        )
        effect = effect_on_grid(self.blocks[name], features.x, gradient)
        return self._placed(features, effect[None], [box])[0]

    def _smallest_object(self, point: Point) -> tuple[Tensor, Box] | None:
        """Score and box of the smallest object that the point is in."""
        assert self.scores is not None
        left, top, right, bottom = self.boxes.T
        inside = (left <= point[0]) & (point[0] <= right) & (top <= point[1]) & (point[1] <= bottom)
        areas = np.where(inside, (right - left) * (bottom - top), np.inf)
        number = int(areas.argmin()) if inside.any() else None
        return None if number is None else (self.scores[number], tuple(self.boxes[number]))


def check_points(points: Sequence[Point], image: np.ndarray) -> None:
    """ValueError: one of the points, x, y in pixels, lies outside the image, (H, W, 3)."""
    height, width = image.shape[:2]
    for x, y in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(
                f"the point {x:g},{y:g} lies outside the image, which is {width} pixels wide and "
                f"{height} high"
            )
