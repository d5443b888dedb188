"""What points of an image attend to in a detector's non-local blocks (the paper's Figure 3), what
that adds to them, and what it does to the scores of objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import inference_context
from torch import Tensor, nn

from nl_detectron.analysis.attention_map import AttentionMaps
from nl_detectron.analysis.attention_record import AttentionRecord
from nl_detectron.analysis.placement import Point, place
from nl_detectron.analysis.recording import (
    choose_blocks,
    detection_heads,
    input_and_boxes,
    record_calls,
    record_outputs,
    scoring_blocks,
)
from nl_detectron.validation import check_choice

__all__ = ["AttentionRecord", "attention_maps", "attention_of", "record_attention"]


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
        min_score: of objects; those with a lower one are left out.
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
    :func:`record_attention` with the model, resizing and input format of a predictor, Detectron2's
    or ours.
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
    """:func:`record_attention` and :meth:`AttentionRecord.maps` in one call."""
    return record_attention(model, image, **options).maps(points)


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"the image is {image.dtype} of shape {image.shape}, but must be uint8 of shape "
            "(height, width, 3)"
        )
