"""Drawing objects into an image, predicted or annotated. Images are BGR, as OpenCV reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode, Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import GenericMask, Visualizer
from matplotlib.patches import Circle
from PIL import Image, ImageDraw, ImageFont

from nl_detectron.data.coco_format import Record

GAP = 8  # between pictures, in pixels
MIN_SIZE = 400  # pixels, of the longer side; smaller images are enlarged, for labels to be legible
_Box = tuple[float, float, float, float]  # left, top, right, bottom


class _Object(NamedTuple):
    """In pixels of the image, before it is enlarged."""

    category: int
    label: str
    box: np.ndarray  # (4,) left, top, right, bottom
    mask: Any  # whatever Detectron2's GenericMask takes; None for none
    keypoints: np.ndarray | None  # (K, 3) x, y, and above 0 where there is one


def legible_scale(image: np.ndarray) -> int:
    """
    Args:
        image: (H, W, 3).

    Returns:
        The ``scale`` that makes its longer side about :data:`MIN_SIZE`; 1 for larger ones.
    """
    return max(1, round(MIN_SIZE / max(image.shape[:2])))


def draw_predictions(
    image: np.ndarray, instances: Instances, metadata: Metadata, scale: float = 1
) -> np.ndarray:
    """
    Draw boxes with classes and scores, masks and keypoints, in the colours of the classes. Holes in
    masks stay open; a label is in or beside its own object, where it covers least of the others.

    Args:
        image: (H, W, 3), uint8.
        instances: what a model predicts for the image, on the CPU.
        metadata: names and colours, where known
            (:func:`nl_detectron.engine.predictor.dataset_metadata`).
        scale: size of the picture over that of the image, which is enlarged before it is drawn in.

    Returns:
        (scale H, scale W, 3), uint8.
    """
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    points = instances.pred_keypoints.numpy() if instances.has("pred_keypoints") else None
    objects = [
        _Object(
            category,
            f"{_class_name(category, metadata)} {score:.0%}",
            box,
            None if masks is None else masks[i].astype(np.uint8),
            # A model predicts all of them, wherever they are.
            None if points is None else np.where([True, True, False], points[i], 1),
        )
        for i, (category, score, box) in enumerate(
            zip(
                instances.pred_classes.tolist(),
                instances.scores.tolist(),
                instances.pred_boxes.tensor.numpy(),
            )
        )
    ]
    return _draw(image, objects, metadata, scale)


def draw_ground_truth(
    image: np.ndarray,
    record: Record,
    metadata: Metadata,
    scale: float = 1,
    parts: Collection[str] = ("segmentation", "keypoints"),
) -> np.ndarray:
    """
    Draw annotations as :func:`draw_predictions` draws predictions, in the same colours.

    Args:
        image: (H, W, 3), uint8.
        record: of a registered dataset, in Detectron2's format.
        metadata: the dataset's.
        scale: as for :func:`draw_predictions`.
        parts: what is drawn beside the boxes, where there is any.

    Returns:
        (scale H, scale W, 3), uint8.
    """
    objects = []
    for annotation in record["annotations"]:
        category, box = annotation["category_id"], annotation["bbox"]
        label = _class_name(category, metadata) + (" (crowd)" if annotation.get("iscrowd") else "")
        box = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
        shown = {key: annotation[key] for key in parts if key in annotation}
        mask = shown.get("segmentation") or None
        keypoints = np.reshape(shown["keypoints"], (-1, 3)) if "keypoints" in shown else None
        objects.append(_Object(category, label, np.array(box), mask, keypoints))
    return _draw(image, objects, metadata, scale)


def side_by_side(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """
    Args:
        pictures: (H_i, W_i, 3), uint8.
        captions: one for each.

    Returns:
        (H, W, 3), uint8: the pictures from left to right on white, each under its caption.
    """
    columns = [np.vstack([_strip(text, p.shape[1]), p]) for p, text in zip(pictures, captions)]
    height = max(len(column) for column in columns)
    padded = [
        np.pad(c, ((0, height - len(c)), (GAP * (i > 0), 0), (0, 0)), constant_values=255)
        for i, c in enumerate(columns)
    ]
    return np.hstack(padded)


def stacked(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """
    Args:
        pictures: (H_i, W_i, 3), uint8, wide ones.
        captions: one for each.

    Returns:
        (H, W, 3), uint8: the pictures from top to bottom on white, each under its caption.
    """
    width = max(picture.shape[1] for picture in pictures)
    rows = []
    for picture, caption in zip(pictures, captions):
        margin = ((0, 0), (0, width - picture.shape[1]), (0, 0))
        rows += [_strip(caption, width), np.pad(picture, margin, constant_values=255)]
    return np.vstack(rows)


def _strip(caption: str, width: int) -> np.ndarray:
    """A caption, (height, width, 3), in letters that suit the width and let it fit."""
    size = min(max(width / 24, 14), 32)
    height = round(1.8 * size)
    length = ImageFont.load_default(size).getlength(caption)
    font = ImageFont.load_default(size * min(1, 0.95 * width / max(length, 1)))
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((width / 2, height / 2), caption, "black", font, anchor="mm")
    return np.asarray(strip)


def _class_name(category: int, metadata: Metadata) -> str:
    names = metadata.get("thing_classes")
    return names[category] if names else str(category)


def _draw(
    image: np.ndarray, objects: Sequence[_Object], metadata: Metadata, scale: float
) -> np.ndarray:
    height, width = image.shape[:2]
    size = round(width * scale), round(height * scale)
    if scale != 1:
        way = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
        image = cv2.resize(image, size, interpolation=way)
    if not objects:
        return image
    visualizer = Visualizer(image[:, :, ::-1], metadata)
    palette = metadata.get("thing_colors") or colormap(rgb=True)
    boxes = [tuple((scale * item.box).tolist()) for item in objects]
    for item, box in zip(objects, boxes):
        color = tuple(np.divide(palette[item.category % len(palette)], 255))
        if item.mask is not None:
            mask = GenericMask(item.mask, height, width).mask
            mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
            visualizer.draw_binary_mask(mask, color, alpha=0.4)
        visualizer.draw_box(box, edge_color=color)
        if item.keypoints is not None:
            _draw_keypoints(visualizer, item.keypoints * (scale, scale, 1), metadata)
    font = ImageFont.load_default(min(max(max(size) / 45, 11), 20))
    sizes = [font.getbbox(item.label)[2:] for item in objects]
    places: dict[int, _Box] = {}
    for i in [*range(len(objects))] * 2:  # the first round does not know of the later labels
        others = [*boxes[:i], *boxes[i + 1 :], *(place for j, place in places.items() if j != i)]
        places[i] = _place(boxes[i], (sizes[i][0] + 4, sizes[i][1] + 4), size, others)
    picture = Image.fromarray(visualizer.output.get_image())
    draw = ImageDraw.Draw(picture)
    for i, item in enumerate(objects):
        color = tuple(int(part) for part in palette[item.category % len(palette)])
        draw.rectangle(places[i], fill=color)
        ink = "black" if np.dot(color, (0.299, 0.587, 0.114)) > 140 else "white"
        draw.text((places[i][0] + 2, places[i][1] + 1), item.label, ink, font)
    return np.asarray(picture)[:, :, ::-1]


def _draw_keypoints(visualizer: Visualizer, keypoints: np.ndarray, metadata: Metadata) -> None:
    """Small open circles, and the lines between them that the dataset names."""
    pixel = 72 / visualizer.output.dpi  # in Matplotlib's points
    known = {i: (x, y) for i, (x, y, visibility) in enumerate(keypoints) if visibility > 0}
    names = metadata.get("keypoint_names") or []
    for first, second, rgb in metadata.get("keypoint_connection_rules") or []:
        ends = [known.get(names.index(name)) for name in (first, second)]
        if None not in ends:
            xs, ys = zip(*ends)
            visualizer.draw_line(xs, ys, tuple(np.divide(rgb, 255)), linewidth=1.5 * pixel)
    for x, y in known.values():
        for color, line in (("black", 3.5), ("white", 1.6)):
            circle = Circle((x, y), 3, fill=False, edgecolor=color, linewidth=line * pixel)
            visualizer.output.ax.add_patch(circle)


def _place(box: _Box, label: Any, size: Any, others: Sequence[_Box]) -> _Box:
    """
    Where a label (width, height) of a box goes in a picture (width, height): into its upper left
    corner if it fits there well, else above, below or beside it; the first place that covers
    nothing of the other boxes, or that which covers least.
    """
    (left, top, right, bottom), (width, height) = box, label
    corners = [
        (left, top - height),
        (right - width, top - height),
        (left, bottom),
        (right - width, bottom),
        (right, top),
        (left - width, top),
        (left, top),
    ]
    if width <= right - left and 3 * height <= bottom - top:
        corners.insert(0, (left, top))
    places = []
    for x, y in corners:
        x, y = min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)
        places.append((x, y, x + width, y + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in others))


def _overlap(a: _Box, b: _Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
