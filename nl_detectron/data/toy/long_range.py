"""The built-in datasets ``long_range*``: something far away tells the class of an object.

Every picture has one green square. A disc is the cue: its colour, red or blue, is the class of the
square, and says on which of its sides, left or right, its one keypoint lies. The square itself
looks the same for both. There are three sets of the same squares:

``long_range``: the disc is at the other end of the picture.
``long_range_near``: it is right beside the square.
``long_range_none``: there is none, and the class is random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from shapely.affinity import rotate
from shapely.geometry import LineString, Point, Polygon, box

from nl_detectron.data.coco_format import Record
from nl_detectron.data.toy.built_in import cache_folder, make_dataset, register_dataset
from nl_detectron.data.toy.scene import Color, SceneObject, draw_scene, plain_background
from nl_detectron.validation import check_choice

CUES = ("far", "near", "none")
HEIGHT, WIDTH = 32, 256
# The least distance between any pixel of a square and any of its cue in the set ``long_range``.
MIN_GAP = 180
CUE_COLORS = {"red": (214, 69, 80), "blue": (62, 122, 200)}
SQUARE_COLOR = (84, 158, 74)
BACKGROUND_COLOR = (128, 128, 128)
CUE_RADIUS = 8
KEYPOINT_NAMES = ["side"]


def _draw(rng: np.random.Generator, split: str, *, cue: str) -> tuple[Image.Image, list[Record]]:
    # The same random numbers for every cue, so that the three sets have the same squares.
    category, is_mirrored = (int(i) for i in rng.integers(2, size=2))
    square_x, cue_x = rng.uniform(15, 30), WIDTH - rng.uniform(10, 20)
    square_y, cue_y = rng.uniform(13, 19, size=2)
    half, degrees = rng.uniform(8, 10), rng.uniform(-15, 15)
    if cue == "near":
        cue_x = square_x + 24
    if is_mirrored:
        square_x, cue_x = WIDTH - square_x, WIDTH - cue_x

    square, axis = rotated_square(square_x, square_y, half, degrees)
    disc = Point(cue_x, cue_y).buffer(CUE_RADIUS)
    scene = [SceneObject("square", SQUARE_COLOR, square, axis=None)]
    if cue != "none":
        color = list(CUE_COLORS.values())[category]
        scene.append(SceneObject("disc", color, disc, axis=None))
    picture = draw_scene(rng, scene, plain_background(BACKGROUND_COLOR, (HEIGHT, WIDTH)))
    return picture, [annotate_square(category, square, axis)]


def rotated_square(x: float, y: float, half: float, degrees: float) -> tuple[Polygon, LineString]:
    """A square turned around its centre, and the line between its left and right side's middles."""
    parts = box(x - half, y - half, x + half, y + half), LineString([(x - half, y), (x + half, y)])
    square, axis = (rotate(part, degrees, (x, y)) for part in parts)
    return square, axis


def annotate_square(category: int, square: Polygon, axis: LineString) -> Record:
    """The COCO annotation of a square, without ids; its keypoint is that end of the axis."""
    left, top, right, bottom = square.bounds
    x, y = axis.coords[category]
    return {
        "category_id": 1 + category,
        "iscrowd": 0,
        "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
        "area": round(square.area, 2),
        "segmentation": [np.asarray(square.exterior.coords[:-1]).round(2).ravel().tolist()],
        # A pixel's index, 0.5 less than the coordinates of polygons, as Detectron2 expects.
        "keypoints": [round(x - 0.5, 2), round(y - 0.5, 2), 2],
        "num_keypoints": 1,
    }


def make_long_range(root: str | Path, cue: str, num_train: int = 1000, num_val: int = 200) -> Path:
    """Draw one of the long-range datasets, and return ``root``.

    Raises:
        ValueError: ``cue`` is not "far", "near" or "none".
        FileExistsError: ``root`` exists and holds something else.
    """
    check_choice("cue", cue, CUES)
    name, draw = f"long_range with cue {cue!r}", partial(_draw, cue=cue)
    counts = {"train": num_train, "val": num_val}
    return make_dataset(root, name, draw, square_categories(CUE_COLORS), counts)


def square_categories(names: Iterable[str]) -> list[Record]:
    """COCO's categories of these names, each with the one keypoint."""
    return [
        {"id": i, "name": name, "keypoints": KEYPOINT_NAMES, "skeleton": []}
        for i, name in enumerate(names, start=1)
    ]


def register_long_range(root: str | Path | None = None) -> None:
    """Register ``long_range``, ``long_range_near`` and ``long_range_none``, each ``_train`` and
    ``_val``, anew if need be, to be made in folders of ``root``, by default in Detectron2's cache.
    """
    makers = {cue: partial(make_long_range, cue=cue) for cue in CUES}
    register_square_sets("long_range", root, makers, CUE_COLORS)


def register_square_sets(
    name: str,
    root: str | Path | None,
    makers: Mapping[str, Callable[[Path], Path]],
    classes: Mapping[str, Color],
    annotation_keys: Sequence[str] = (),
) -> None:
    """Register sets of squares: ``name`` of the kind "far", with the kind behind it of others.

    ``makers`` map a kind to what makes its set, ``classes`` names to their colours for drawing.
    """
    for kind, make in makers.items():
        register_dataset(
            name if kind == "far" else f"{name}_{kind}",
            Path(root or cache_folder(f"{name}-v1")) / kind,
            make,
            annotation_keys,
            thing_classes=list(classes),
            thing_colors=list(classes.values()),
            keypoint_names=KEYPOINT_NAMES,
            keypoint_flip_map=[],
            keypoint_connection_rules=[],
        )
