"""What points of an image attend to in a detector's non-local blocks (the paper's Figure 3), what
that adds to them, and what it does to the scores of objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import inference_context
from torch import Tensor, nn

from nl_detectron.analysis.attention_map import AttentionMap, AttentionMaps, BlockAttention
from nl_detectron.analysis.contribution import (
    WHAT,
    contributions_on_grid,
    effect_on_grid,
    weights_on_grid,
)
from nl_detectron.analysis.placement import Box, PlacedFeatures, Point, place
from nl_detectron.analysis.recording import (
    choose_blocks,
    detection_heads,
    input_and_boxes,
    record_calls,
    record_outputs,
    scoring_blocks,
)
from nl_detectron.layers import AttentionBlock
from nl_detectron.validation import check_choice


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
        What counts for the points. A point in several objects' boxes is asked in the smallest.

        Args:
            points: x, y in pixels of the image, whose upper left corner is 0, 0.
            what: "weights", what the points attend to; "contributions", what each place adds to
                them (:func:`nl_detectron.analysis.contribution.contributions_on_grid`); or
                "effect", that of each place on the score of the object that the point is in
                (:func:`nl_detectron.analysis.contribution.effect_on_grid`).

        Returns:
            For each block a map for each point; of effects, for each block outside of the heads.

        Raises:
            ValueError: a point lies outside the image, or effects are asked for and were not
                recorded.
        """
        check_points(points, self.image)
        check_choice("what", what, WHAT)
        if what == "effect" and self.scores is None:
            raise ValueError("no effects are recorded: call record_attention with effects=True")
        maps_of = self._effects_of_block if what == "effect" else self._maps_of_block
        blocks = [
            BlockAttention(name, block.pairwise, maps_of(name, points, what))
            for name, block in self.blocks.items()
            if what != "effect" or name in self.outputs
        ]
        return AttentionMaps(self.image, list(points), blocks, what)

    def ask(
        self,
        name: str,
        features: PlacedFeatures,
        cells: Sequence[tuple[int, int]],
        what: str = "weights",
    ) -> list[AttentionMap]:
        """
        Args:
            name: a block's.
            features: some of the block's in :attr:`features`.
            cells: row and column of each query.
            what: "weights" or "contributions".

        Returns:
            What counts for each of the cells.
        """
        on_grid = weights_on_grid if what == "weights" else contributions_on_grid
        weights = on_grid(self.blocks[name], features.x, cells)
        return self._placed(features, weights, [features.cell_box(cell) for cell in cells])

    def _placed(
        self, features: PlacedFeatures, on_grid: Tensor, queries: Sequence[Box]
    ) -> list[AttentionMap]:
        """A map of each (key rows, key columns), what lies in the image of it."""
        weights = on_grid.cpu().numpy()
        rows = features.rows.of_keys(weights.shape[1])
        columns = features.columns.of_keys(weights.shape[2])
        height, width = self.image.shape[:2]
        rows_seen, columns_seen = rows.visible(height), columns.visible(width)
        (top, bottom), (left, right) = rows.span(rows_seen), columns.span(columns_seen)
        seen = weights[:, rows_seen[:, None], columns_seen]
        total = np.abs(weights).sum((1, 2), dtype=np.float64)
        total_seen = np.abs(seen).sum((1, 2), dtype=np.float64)
        outside = (total - total_seen) / np.where(total, total, 1)
        return [
            AttentionMap(
                seen[i],
                extent=(left, top, right, bottom),
                query=query,
                outside=float(outside[i]),
                keys=weights[i].size,
            )
            for i, query in enumerate(queries)
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

    def _effects_of_block(
        self, name: str, points: Sequence[Point], _what: str
    ) -> list[AttentionMap | None]:
        (features,) = self.features[name]
        left, top, right, bottom = self.boxes.T
        areas = (right - left) * (bottom - top)
        maps: list[AttentionMap | None] = []
        for x, y in points:
            inside = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
            smallest = int(np.where(inside, areas, np.inf).argmin()) if inside.any() else None
            maps.append(None if smallest is None else self._effect(name, features, smallest))
        return maps

    def _effect(self, name: str, features: PlacedFeatures, number: int) -> AttentionMap:
        assert self.scores is not None
        (gradient,) = torch.autograd.grad(
            self.scores[number], self.outputs[name], retain_graph=True, materialize_grads=True
        )
        effect = effect_on_grid(self.blocks[name], features.x, gradient)
        (attention_map,) = self._placed(features, effect[None], [tuple(self.boxes[number])])
        return attention_map


def record_attention(
    model: nn.Module,
    image: np.ndarray,
    *,
    blocks: Sequence[str] = (),
    augmentation: T.Augmentation | None = None,
    input_format: str = "BGR",
    min_score: float = 0.5,
    effects: bool = False,
) -> AttentionRecord:
    """
    Run a detector on an image, and keep what its non-local blocks were given.

    Args:
        model: a model of Detectron2, in training mode or not.
        image: (H, W, 3) uint8, BGR as ``cv2.imread`` and ``DefaultPredictor`` have it.
        blocks: which blocks, as for :func:`choose_blocks`; all by default.
        augmentation: how the image is resized for the model, such as a ``DefaultPredictor``'s
            ``aug``. It may also flip the image: everything is mapped back.
        input_format: what the model expects, ``cfg.INPUT.FORMAT``: "BGR" or "RGB".
        min_score: detected objects with a lower score are left out.
        effects: keep also what effects on the objects' scores are computed of, which takes the
            memory of a training step.

    Returns:
        The record, in pixels of ``image``.

    Raises:
        ValueError: the image is not as above, there is no such block, or what it is given has no
            place in the image; or for effects, none of the blocks has a part in objects' scores.
    """
    chosen = choose_blocks(model, blocks)
    check_choice("input_format", input_format, ("BGR", "RGB"))
    _check_image(image)
    augmented = T.AugInput(image[:, :, ::-1] if input_format == "RGB" else image)
    transform = augmentation(augmented) if augmentation else T.NoOpTransform()
    pixels = torch.from_numpy(np.array(augmented.image.transpose(2, 0, 1), np.float32))

    heads, scoring = detection_heads(model), scoring_blocks(model, blocks) if effects else {}
    backbone = model.get_submodule("backbone")
    called: dict[str, nn.Module] = {"backbone": backbone, **heads, **chosen}
    with (
        inference_context(model),
        torch.set_grad_enabled(effects),
        record_calls(called) as calls,
        record_outputs(scoring) as outputs,
    ):
        output = model([{"image": pixels}])[0]

    def in_image(boxes: Tensor) -> np.ndarray:
        """(N, 4) boxes in pixels of the model's input to those in pixels of the image."""
        corners = boxes.detach().double().cpu().numpy().reshape(-1, 2)
        return transform.inverse().apply_coords(corners).reshape(-1, 4)

    features = {}
    for name in chosen:
        x, boxes = input_and_boxes(name, calls, heads, min_score)
        features[name] = [place(x[i : i + 1], box) for i, box in enumerate(in_image(boxes))]
    objects, scores = torch.empty(0, 4), torch.empty(0)
    if "instances" in output:  # a model for semantic segmentation has none
        found = output["instances"]
        found = found[found.scores >= min_score]
        objects, scores = found.pred_boxes.tensor, found.scores
    return AttentionRecord(
        np.ascontiguousarray(image[:, :, ::-1]),
        in_image(objects),
        chosen,
        features,
        scores if effects else None,
        outputs,
    )


def attention_of(predictor: DefaultPredictor, image: np.ndarray, **options: Any) -> AttentionRecord:
    """
    :func:`record_attention` with a predictor's model, resizing and input format.

    Args:
        predictor: Detectron2's, or ours.
        image, **options: as for :func:`record_attention`.

    Returns:
        The record.

    Raises:
        ValueError: as there.
    """
    return record_attention(
        predictor.model,
        image,
        augmentation=predictor.aug,
        input_format=predictor.input_format,
        **options,
    )


def attention_maps(
    model: nn.Module, image: np.ndarray, points: Sequence[Point], **options: Any
) -> AttentionMaps:
    """
    :func:`record_attention` and :meth:`AttentionRecord.maps` in one call.

    Args:
        model, image, **options: as for :func:`record_attention`.
        points: x, y in pixels of the image.

    Returns:
        What the points attend to in the detector's non-local blocks.

    Raises:
        ValueError: as both of them.
    """
    return record_attention(model, image, **options).maps(points)


def check_points(points: Sequence[Point], image: np.ndarray) -> None:
    """
    Args:
        points: x, y in pixels.
        image: (H, W, 3).

    Raises:
        ValueError: a point lies outside the image.
    """
    height, width = image.shape[:2]
    for x, y in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(
                f"the point {x:g},{y:g} lies outside the image, which is {width} pixels wide and "
                f"{height} high"
            )


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"the image is {image.dtype} of shape {image.shape}, but must be uint8 of shape "
            "(height, width, 3)"
        )
