"""What is in the pictures of long_range* and long_range_match*: of both, then of each."""

from colorsys import rgb_to_hsv

import numpy as np
import pytest

from nl_detectron.data.toy.long_range import MIN_GAP, WIDTH
from nl_detectron.data.toy.long_range_match import DISCS, PARTNERS, TRAIN_COUNTS
from tests.data.toy.conftest import FAMILIES

KINDS = [(name, kind) for name, family in FAMILIES.items() for kind in family.kinds if kind]


def columns(mask):
    present = np.nonzero(mask.any(0))[0]
    return present[0], present[-1]


def gap(mask, other):
    """Columns between the two."""
    (_, left), (right, _) = sorted((columns(mask), columns(other)))
    return right - left - 1


def color(pixels, x, y):
    """Mean hue, saturation and value, 0 to 1, of a few pixels around a place: without the grain."""
    patch = pixels[round(y) - 2 : round(y) + 2, round(x) - 2 : round(x) + 2]
    return rgb_to_hsv(*patch.mean((0, 1)) / 255)


@pytest.mark.parametrize("name", ["long_range", "long_range_match"])
def test_all_sets_of_a_family_have_the_same_squares(roots, name):
    files = [roots / name / kind / "val.json" for kind in FAMILIES[name].kinds]
    assert len({file.read_text().split('"images"')[1] for file in files}) == 1


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_squares_are_where_the_masks_are(examples, name, kind):
    for pixels, annotations, masks in examples(name, kind):
        for annotation, mask in zip(annotations, masks):
            x, _, width, _ = annotation["bbox"]
            left, right = columns(mask)
            assert [left, right + 1] == pytest.approx([x, x + width], abs=1)
            share = 0.05 if name == "long_range" else 0.1  # those of the other are smaller
            assert annotation["area"] == pytest.approx(mask.sum(), rel=share)
            assert (np.ptp(pixels, axis=2)[mask] > 12).mean() > 0.95
            # The keypoint lies on the side that the class names.
            side = (annotation["keypoints"][0] - x) / width
            assert side < 0.2 if annotation["category_id"] == 1 else side > 0.75


# long_range


def cue_pixels(pixels):
    """Where it is red, and where it is blue."""
    red, green, blue = pixels.transpose(2, 0, 1)
    return red > np.maximum(green, blue) + 30, blue > np.maximum(red, green) + 30


@pytest.mark.parametrize(("cue", "low", "high"), [("far", MIN_GAP, 256), ("near", 2, 9)])
def test_the_cue_has_the_colour_of_the_class_and_its_distance(examples, cue, low, high):
    for pixels, (annotation,), (square,) in examples("long_range", cue):
        red, blue = cue_pixels(pixels)
        assert [red.any(), blue.any()] == [annotation["category_id"] == i for i in (1, 2)]
        assert low <= gap(square, red | blue) <= high


def test_without_a_cue_nothing_but_the_square_stands_out(examples):
    for pixels, _, (square,) in examples("long_range", "none"):
        assert not np.any(cue_pixels(pixels))
        assert np.abs(np.median(pixels[~square], 0) - 128).max() <= 1


def test_green_is_the_square(examples):
    for pixels, _, (mask,) in examples("long_range", "none"):
        red, green, blue = pixels.transpose(2, 0, 1)
        is_green = green > np.maximum(red, blue) + 20
        assert (is_green & mask).sum() >= 0.9 * (is_green | mask).sum()


def test_classes_and_ends_are_balanced_and_independent(examples):
    found = [(a["category_id"], a["bbox"][0] < 128) for _, (a,), _ in examples("long_range", "far")]
    counts = [found.count((category, left)) for category in (1, 2) for left in (False, True)]
    assert sum(counts) == 60
    assert min(counts) >= 8


# long_range_match


def center(annotation):
    x, y, width, height = annotation["bbox"]
    return x + width / 2, y + height / 2


def disc_colors(pixels, annotations):
    """Of the discs at the far end."""
    is_left = annotations[0]["bbox"][0] < WIDTH / 2
    colors = [color(pixels, x if is_left else WIDTH - x, y) for x, y in DISCS]
    return [c for c in colors if c[1] > 0.1]  # what is not grey


def is_bright(disc_color):
    return disc_color[2] > 0.7


def hue_distance(one, other):
    """0 to 0.5, in turns."""
    return 0.5 - abs(abs(one - other) - 0.5)


@pytest.mark.parametrize("partner", PARTNERS)
def test_all_discs_are_far_from_all_squares(examples, partner):
    for pixels, _, squares in examples("long_range_match", partner):
        square_columns = np.nonzero(np.logical_or(*squares).any(0))[0]
        coloured = np.ptp(pixels, axis=2).max(0) > 12
        coloured[square_columns.min() - 1 : square_columns.max() + 2] = False
        disc_columns = np.nonzero(coloured)[0]
        assert (abs(square_columns[:, None] - disc_columns) - 1).min() >= MIN_GAP


def test_two_bright_and_two_dark_discs_in_validation_and_different_partners(examples):
    for pixels, annotations, _ in examples("long_range_match", "far"):
        assert sorted(map(is_bright, disc_colors(pixels, annotations))) == [False] * 2 + [True] * 2
        one, other = (a["partner"] for a in annotations)
        assert one != other


def test_one_two_or_four_discs_in_training(examples):
    found = examples("long_range_match", "far", "train")
    counts = [len(disc_colors(pixels, annotations)) for pixels, annotations, _ in found]
    assert set(counts) == set(TRAIN_COUNTS)
    assert min(counts.count(count) for count in TRAIN_COUNTS) >= 10


@pytest.mark.parametrize("split", ["train", "val"])
def test_partner_has_the_hue_of_the_square_and_its_value_is_the_class(examples, split):
    for pixels, annotations, _ in examples("long_range_match", "far", split):
        for annotation in annotations:
            hue, saturation, value = color(pixels, *center(annotation))
            # The square looks the same for both classes.
            assert [saturation, value] == pytest.approx([0.7, 0.82], abs=0.03)
            x, y, radius = annotation["partner"]
            partner = color(pixels, x, y)
            assert hue_distance(hue, partner[0]) < 5 / 360
            assert is_bright(partner) == (annotation["category_id"] == 1)
            others = [c for c in disc_colors(pixels, annotations) if c != partner]
            assert sum(hue_distance(hue, other[0]) < 0.1 for other in others) <= 1  # the partner
            assert radius == 7.5


def test_near_discs_show_the_class_on_the_square(examples):
    for pixels, annotations, _ in examples("long_range_match", "near"):
        for annotation in annotations:
            disc = color(pixels, *center(annotation))
            assert is_bright(disc) == (annotation["category_id"] == 1)
            assert disc == pytest.approx(color(pixels, *annotation["partner"][:2]), abs=0.03)


def test_classes_ends_and_places_of_partners_are_balanced(examples):
    found = [
        (a["category_id"], a["bbox"][0] < 128, a["partner"][1] < 16)
        for _, annotations, _ in examples("long_range_match", "far")
        for a in annotations
    ]
    assert len(found) == 120
    assert min(map(found.count, set(found))) >= 6
    assert len(set(found)) == 8
