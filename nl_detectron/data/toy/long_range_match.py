"""The built-in datasets ``long_range_match*``: one of many far discs tells the class of a square.

At one end of every picture are up to four discs of different hues, each bright or dark. At the
other end are two squares, each with the hue of one of the discs, its partner. Whether the partner
is bright or dark is the class of the square, and says on which of its sides, left or right, its one
keypoint lies. The squares look the same for both. In the validation split there are always four
discs, two bright and two dark, so that their mean brightness tells nothing: each square has to find
its own partner. There are two sets of the same squares:

``long_range_match``: all discs are at the other end of the picture.
``long_range_match_near``: there is also a small disc like the partner's on each square.
"""

from __future__ import annotations

from colorsys import hsv_to_rgb
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from shapely.geometry import Point

from nl_detectron.data.coco_format import Record
from nl_detectron.data.toy.built_in import make_dataset
from nl_detectron.data.toy.long_range import (
    BACKGROUND_COLOR,
    HEIGHT,
    WIDTH,
    annotate_square,
    register_square_sets,
    rotated_square,
    square_categories,
)
from nl_detectron.data.toy.scene import Color, SceneObject, draw_scene, plain_background
from nl_detectron.validation import check_choice

PARTNERS = ("far", "near")
# Of a disc, by its class: saturation and brightness, 0 to 1.
VALUES = {"bright": (0.45, 1.0), "dark": (0.9, 0.45)}
# For drawing annotations and predictions.
CLASS_COLORS = {"bright": (255, 205, 140), "dark": (115, 64, 11)}
SQUARE = (0.7, 0.82)  # saturation and brightness
SQUARE_X, SQUARE_Y, SQUARE_HALF = (11, 32), (13, 19), (7, 8)
HUE_JITTER = 0.15  # of the step between the hues of a picture
HUE_ERROR = 3 / 360  # of a square's hue, at most, in turns of the colour circle
DISCS = [(x, y) for x in (WIDTH - 25, WIDTH - 9) for y in (8, 24)]
DISC_RADIUS, NEAR_RADIUS = 7.5, 4
# How many discs a training picture has; from the few a block learns to look at discs at all.
TRAIN_COUNTS = (1, 2, 4)


def _draw(
    rng: np.random.Generator, split: str, *, partner: str
) -> tuple[Image.Image, list[Record]]:
    # The same random numbers for both sets, so that they have the same squares.
    is_val = split == "val"
    count = len(DISCS) if is_val else int(rng.choice(TRAIN_COUNTS))
    is_mirrored = bool(rng.integers(2))
    steps = np.arange(count) + rng.uniform(-HUE_JITTER, HUE_JITTER, size=count)
    hues = rng.uniform() + rng.permutation(steps) / count
    values = rng.permutation(np.arange(count) % 2) if is_val else rng.integers(2, size=count)
    centers = rng.permutation(DISCS)[:count] + rng.uniform(-1, 1, size=(count, 2))
    if is_mirrored:
        centers[:, 0] = WIDTH - centers[:, 0]

    colors = [_color(hue, list(VALUES.values())[value]) for hue, value in zip(hues, values)]
    discs = [_disc(x, y, DISC_RADIUS, color) for (x, y), color in zip(centers, colors)]
    squares, near_discs, annotations = [], [], []
    # If there is a single disc, it is the partner of both squares.
    for x, i in zip(SQUARE_X, np.resize(rng.permutation(count), len(SQUARE_X))):
        x, y = WIDTH - x if is_mirrored else x, rng.uniform(*SQUARE_Y)
        square, axis = rotated_square(x, y, rng.uniform(*SQUARE_HALF), rng.uniform(-12, 12))
        color = _color(hues[i] + rng.uniform(-HUE_ERROR, HUE_ERROR), SQUARE)
        squares.append(SceneObject("square", color, square, axis=None))
        near_discs.append(_disc(x, y, NEAR_RADIUS, colors[i]))
        place = [*centers[i].round(2).tolist(), DISC_RADIUS]
        annotations.append({**annotate_square(int(values[i]), square, axis), "partner": place})
    scene = [*discs, *(near_discs if partner == "near" else []), *squares]
    picture = draw_scene(rng, scene, plain_background(BACKGROUND_COLOR, (HEIGHT, WIDTH)))
    return picture, annotations


def _color(hue: float, saturation_and_value: tuple[float, float]) -> Color:
    red, green, blue = (round(255 * part) for part in hsv_to_rgb(hue % 1, *saturation_and_value))
    return red, green, blue


def _disc(x: float, y: float, radius: float, color: Color) -> SceneObject:
    return SceneObject("disc", color, Point(x, y).buffer(radius), axis=None)


def make_long_range_match(
    root: str | Path, partner: str, num_train: int = 2000, num_val: int = 200
) -> Path:
    """Draw one of the datasets, and return ``root``. An annotation has beside COCO's keys
    "partner": x, y and radius, in pixels, of the far disc that tells the square's class.

    Raises:
        ValueError: ``partner`` is not "far" or "near".
        FileExistsError: ``root`` exists and holds something else.
    """
    check_choice("partner", partner, PARTNERS)
    name, draw = f"long_range_match with partner {partner!r}", partial(_draw, partner=partner)
    counts = {"train": num_train, "val": num_val}
    return make_dataset(root, name, draw, square_categories(VALUES), counts)


def register_long_range_match(root: str | Path | None = None) -> None:
    """Register ``long_range_match`` and ``long_range_match_near``, each ``_train`` and ``_val``,
    anew if need be, to be made in folders of ``root``, by default in Detectron2's cache."""
    makers = {partner: partial(make_long_range_match, partner=partner) for partner in PARTNERS}
    register_square_sets("long_range_match", root, makers, CLASS_COLORS, ["partner"])
