import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from nl_detectron.data.toy import make_long_range
from nl_detectron.data.toy.long_range import CUES, MIN_GAP


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("long_range")
    for cue in CUES:
        make_long_range(root / cue, cue, num_train=3, num_val=60)
    return root


def examples(root, cue):
    """Of each picture its pixels, its annotation, and the square's mask."""
    coco = COCO(root / cue / "val.json")
    for image_id, image in coco.imgs.items():
        pixels = np.asarray(Image.open(root / cue / "val" / image["file_name"])).astype(int)
        (annotation,) = coco.imgToAnns[image_id]
        yield pixels, annotation, coco.annToMask(annotation).astype(bool)


def cue_pixels(pixels):
    """Where it is red, and where it is blue."""
    red, green, blue = pixels.transpose(2, 0, 1)
    return red > np.maximum(green, blue) + 30, blue > np.maximum(red, green) + 30


def columns(mask):
    present = np.nonzero(mask.any(0))[0]
    return present[0], present[-1]


def gap(mask, other):
    """Columns between the two."""
    (_, left), (right, _) = sorted((columns(mask), columns(other)))
    return right - left - 1


@pytest.mark.parametrize("cue", ["far", "near"])
def test_colour_of_the_disc_is_the_class(root, cue):
    for pixels, annotation, _ in examples(root, cue):
        red, blue = cue_pixels(pixels)
        assert bool(red.any()) == (annotation["category_id"] == 1)
        assert bool(blue.any()) == (annotation["category_id"] == 2)


@pytest.mark.parametrize(("cue", "low", "high"), [("far", MIN_GAP, 256), ("near", 2, 9)])
def test_distance_of_the_cue(root, cue, low, high):
    for pixels, _, square in examples(root, cue):
        assert low <= gap(square, np.logical_or(*cue_pixels(pixels))) <= high


def test_without_a_cue_nothing_but_the_square_stands_out(root):
    for pixels, _, square in examples(root, "none"):
        assert not np.any(cue_pixels(pixels))
        background = pixels[~np.pad(square, 1)[1:-1, 1:-1]]
        assert np.abs(np.median(background, 0) - 128).max() <= 1


def test_squares_are_the_same_whatever_the_cue(root):
    texts = [(root / cue / "val.json").read_text().split('"images"')[1] for cue in CUES]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("cue", CUES)
def test_square_is_where_the_mask_is(root, cue):
    for pixels, annotation, mask in examples(root, cue):
        red, green, blue = pixels.transpose(2, 0, 1)
        is_green = green > np.maximum(red, blue) + 20
        assert (is_green & mask).sum() >= 0.9 * (is_green | mask).sum()
        x, _, width, _ = annotation["bbox"]
        left, right = columns(mask)
        assert [left, right + 1] == pytest.approx([x, x + width], abs=1)
        assert annotation["area"] == pytest.approx(mask.sum(), rel=0.05)


def test_classes_and_ends_are_balanced_and_independent(root):
    pairs = [
        (a["category_id"], a["bbox"][0] < 128, gap(mask, np.logical_or(*cue_pixels(pixels))) > 0)
        for pixels, a, mask in examples(root, "far")
    ]
    counts = [pairs.count((category, left, True)) for category in (1, 2) for left in (False, True)]
    assert sum(counts) == 60
    assert min(counts) >= 8


def test_keypoint_lies_on_the_side_that_the_class_names(root):
    for _, annotation, _ in examples(root, "far"):
        x, _, width, _ = annotation["bbox"]
        place = (annotation["keypoints"][0] - x) / width
        assert place < 0.15 if annotation["category_id"] == 1 else place > 0.8


def test_pictures_differ_and_are_the_same_again(root, tmp_path):
    make_long_range(tmp_path / "far", "far", num_train=3, num_val=2)
    pictures = [path.read_bytes() for path in sorted((root / "far").glob("*/*.png"))]
    assert len(set(pictures)) == len(pictures) == 63
    for path in sorted((tmp_path / "far").glob("*/*.png")):
        again = np.asarray(Image.open(path))
        first = np.asarray(Image.open(root / path.relative_to(tmp_path)))
        assert np.array_equal(again, first)
