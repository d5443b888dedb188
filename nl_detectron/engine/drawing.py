"""Drawing objects into an image, predicted or annotated. Images are BGR, as OpenCV reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode, Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import GenericMask, Visualizer
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont

GAP = 8  # between pictures, in pixels
MIN_SIZE = 400  # pixels, of the longer side; smaller images are enlarged, for labels to be legible


def legible_scale(image: np.ndarray) -> int:
    """The ``scale`` that makes an image's longer side about ``MIN_SIZE``; 1 for larger ones."""
    return max(1, round(MIN_SIZE / max(image.shape[:2])))


def draw_predictions(
    image: np.ndarray, instances: Instances, metadata: Metadata, scale: float = 1
) -> np.ndarray:
    """:func:`draw_annotations` of what a model predicts for the image, on the CPU."""
    values = (instances.pred_boxes.tensor, instances.pred_classes, instances.scores)
    found: list[dict[str, Any]] = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "score": score}
        for box, category, score in zip(*(value.tolist() for value in values))
    ]
    for i, prediction in enumerate(found):
        if instances.has("pred_masks"):
            prediction["segmentation"] = instances.pred_masks[i].numpy().astype(np.uint8)
        if instances.has("pred_keypoints"):  # all of them, wherever they are
            points = instances.pred_keypoints[i, :, :2].numpy()
            prediction["keypoints"] = np.insert(points, 2, 1, 1)
    return draw_annotations(image, found, metadata, scale)


def draw_annotations(
    image: np.ndarray,
    annotations: Sequence[Mapping[str, Any]],
    metadata: Metadata,
    scale: float = 1,
    parts: Collection[str] = ("segmentation", "keypoints"),
) -> np.ndarray:
    """Draw objects with Detectron2's ``Visualizer``, in the colours of their classes, as far as
    these are known: boxes, and those ``parts`` that they have. The image, (H, W, 3), is scaled
    before, so that the picture is (scale H, scale W, 3). Annotations are in Detectron2's format; a
    prediction has a "score", too."""
    height, width = image.shape[:2]
    size = round(width * scale), round(height * scale)
    if scale != 1:
        way = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
        image = cv2.resize(image, size, interpolation=way)
    if not annotations:
        return image
    visualizer = Visualizer(image[:, :, ::-1], metadata)
    palette = metadata.get("thing_colors") or colormap(rgb=True)
    colors = [np.divide(palette[a["category_id"] % len(palette)], 255) for a in annotations]
    shown = [{part: a[part] for part in parts if len(a.get(part, ()))} for a in annotations]
    for of_object, color in zip(shown, colors):
        if "segmentation" in of_object:
            mask = GenericMask(of_object["segmentation"], height, width).mask
            mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
            visualizer.draw_binary_mask(mask, color, alpha=0.4)  # which leaves holes open
    corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    boxes = scale * np.array(corners)
    visualizer.overlay_instances(boxes=boxes, assigned_colors=colors)
    for of_object in shown:
        if "keypoints" in of_object:
            keypoints = np.reshape(of_object["keypoints"], (-1, 3)) * (scale, scale, 1)
            visualizer.draw_and_connect_keypoints(torch.from_numpy(keypoints))
    drawn: list[Bbox] = []
    for annotation, box in zip(annotations, boxes):
        _draw_label(visualizer, _label(annotation, metadata), box, drawn)
    return visualizer.output.get_image()[:, :, ::-1]


def _label(annotation: Mapping[str, Any], metadata: Metadata) -> str:
    names, category = metadata.get("thing_classes"), annotation["category_id"]
    name = names[category] if names else str(category)
    if "score" in annotation:
        return f"{name} {annotation['score']:.0%}"
    return f"{name} (crowd)" if annotation.get("iscrowd") else name


def _draw_label(visualizer: Visualizer, text: str, box: np.ndarray, others: list[Bbox]) -> None:
    """In the corner of its box from which it stays in the picture, or else where it is not cut
    and overlaps the fewest of the others, which it joins; small boxes have it outside."""
    width, height = visualizer.output.width, visualizer.output.height
    left, top, right, bottom = np.clip(box, 0, (width, height, width, height))
    size = max((width * height) ** 0.5 / 110, 9)  # points
    line = 1.3 * size * visualizer.output.dpi / 72  # pixels
    above, below = top - line if top >= line else top, min(bottom, height - line)
    is_small = bottom - top < 4 * line
    inside = [top, bottom - line] if not is_small else []
    rows = [above if is_small and top >= line else below if is_small else top]
    rows += [*inside, above, below, top - 2 * line, bottom + line]
    sides = [(left, "left"), (right, "right")][:: 1 if left + right < width else -1]
    x, side = sides[0]
    visualizer.draw_text(
        text, (x, rows[0]), font_size=size, color="white", horizontal_alignment=side
    )
    label = visualizer.output.ax.texts[-1]

    def put(place: tuple[float, tuple[float, str]]) -> Bbox:
        row, (x, side) = place
        label.set(position=(x, row), horizontalalignment=side)
        return label.get_window_extent().padded(0.2 * line)

    def cost(place: tuple[float, tuple[float, str]]) -> int:
        extent = put(place)
        is_cut = extent.x0 < -0.2 * line or extent.x1 > width + 0.2 * line
        return is_cut + extent.count_overlaps(others)

    legal = [(row, side) for row in rows for side in sides if 0 <= row <= height - line]
    best = min(legal, key=cost)
    others.append(put(best))


def side_by_side(
    pictures: Sequence[np.ndarray], captions: Sequence[str], axis: int = 1
) -> np.ndarray:
    """Put pictures from left to right (``axis`` 1) or from top to bottom (0) on white, each under
    its caption: (H_i, W_i, 3) to (H, W, 3), uint8."""
    parts = [np.vstack([_strip(text, p.shape[1]), p]) for p, text in zip(pictures, captions)]
    extent = max(part.shape[1 - axis] for part in parts)
    padded = []
    for i, part in enumerate(parts):
        margin = [(0, 0), (0, 0), (0, 0)]
        margin[axis] = (GAP * (i > 0), 0)
        margin[1 - axis] = (0, extent - part.shape[1 - axis])
        padded.append(np.pad(part, margin, constant_values=255))
    return np.concatenate(padded, axis)


def _strip(caption: str, width: int) -> np.ndarray:
    """A caption, (height, width, 3), in letters that suit the width and let it fit."""
    size = min(max(width / 24, 14), 32)
    height = round(1.8 * size)
    length = ImageFont.load_default(size).getlength(caption)
    font = ImageFont.load_default(size * min(1, 0.95 * width / max(length, 1)))
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((width / 2, height / 2), caption, "black", font, anchor="mm")
    return np.asarray(strip)
