"""The built-in datasets ``shapes_train`` and ``shapes_val``, drawn when they are first used.

Small pictures of rings, triangles and squares in COCO's format: boxes, masks (with holes,
or cut up by nearer objects), crowd regions, and two keypoints on every object, a light dot at its
head and a dark dot at its tail. Picture i of a split is the same on every machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from shapely.geometry import MultiPolygon, Point, Polygon, box

from nl_detectron.data.coco_format import Record
from nl_detectron.data.toy.built_in import cache_folder, make_dataset, register_dataset
from nl_detectron.data.toy.scene import (
    SHAPES,
    SceneObject,
    Size,
    cloudy_background,
    draw_scene,
    hole_free_polygons,
    sample_scene,
)

KEYPOINT_NAMES = ["head", "tail"]
# For drawing annotations and predictions, in the order of SHAPES; the colour-blind can tell them.
CLASS_COLORS = [(230, 159, 0), (86, 180, 233), (204, 121, 167)]
IMAGE_SIZES = [(128, 128)] * 8 + [(96, 128), (128, 96), (128, 160), (160, 128)]  # height, width


def _segmentation(
    item: SceneObject, visible: list[Polygon], size: Size
) -> list[list[float]] | Record:
    """Lists of polygons [x1, y1, x2, y2, ...]; for a crowd an RLE, as in COCO."""
    polygons = [np.asarray(p.exterior.coords[:-1]).round(2).ravel().tolist() for p in visible]
    if item.axis is not None:
        return polygons
    rle = mask_util.merge(mask_util.frPyObjects(polygons, *size))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _keypoints(item: SceneObject, image: Polygon) -> list[float]:
    """COCO's [x, y, v] per point: v=2 visible, v=1 behind something nearer, v=0 not in the image.

    x and y are pixel indices (0.5 less than the coordinates of polygons), as Detectron2 expects.
    """
    keypoints: list[float] = []
    for x, y in item.axis.coords if item.axis else []:
        if image.buffer(-0.5).contains(Point(x, y)):
            visibility = 1 if item.nearer.contains(Point(x, y)) else 2
            keypoints += [round(x - 0.5, 2), round(y - 0.5, 2), visibility]
        else:
            keypoints += [0, 0, 0]
    return keypoints or [0, 0, 0] * len(KEYPOINT_NAMES)


def annotate(item: SceneObject, size: Size) -> Record:
    """The COCO annotation, without ids, of what can be seen of an object in a picture."""
    image = box(0, 0, *size[::-1])
    visible = hole_free_polygons(item.visible(image))
    left, top, right, bottom = MultiPolygon(visible).bounds
    keypoints = _keypoints(item, image)
    return {
        "category_id": 1 + list(SHAPES).index(item.class_name),
        "iscrowd": int(item.axis is None),
        "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
        "area": round(sum(polygon.area for polygon in visible), 2),
        "segmentation": _segmentation(item, visible, size),
        "keypoints": keypoints,
        "num_keypoints": sum(visibility > 0 for visibility in keypoints[2::3]),
    }


def _draw(rng: np.random.Generator, split: str) -> tuple[Image.Image, list[Record]]:
    size = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
    scene = sample_scene(rng, size)
    picture = draw_scene(rng, scene, cloudy_background(rng, size))
    return picture, [annotate(item, size) for item in scene]


def make_shapes(root: str | Path, num_train: int = 600, num_val: int = 100) -> Path:
    """Draw the shapes datasets, and return ``root``.

    Raises:
        FileExistsError: ``root`` exists and holds something else.
    """
    categories: list[Record] = [
        {"id": i, "name": name, "keypoints": KEYPOINT_NAMES, "skeleton": [[1, 2]]}
        for i, name in enumerate(SHAPES, start=1)
    ]
    return make_dataset(root, "shapes", _draw, categories, {"train": num_train, "val": num_val})


def register_shapes(root: str | Path | None = None) -> None:
    """Register ``shapes_train`` and ``shapes_val``, anew if need be, to be made in ``root``, by
    default in Detectron2's cache."""
    register_dataset(
        "shapes",
        Path(root or cache_folder("shapes-v1")),
        make_shapes,
        thing_classes=list(SHAPES),
        thing_colors=CLASS_COLORS,
        keypoint_names=KEYPOINT_NAMES,
        keypoint_flip_map=[],  # neither is the other's mirror image
        keypoint_connection_rules=[("head", "tail", (255, 255, 255))],
    )
