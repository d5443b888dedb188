from colorsys import rgb_to_hsv

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from nl_detectron.data.toy import make_long_range_match
from nl_detectron.data.toy.long_range import MIN_GAP, WIDTH
from nl_detectron.data.toy.long_range_match import DISCS, PARTNERS, TRAIN_COUNTS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("long_range_match")
    for partner in PARTNERS:
        make_long_range_match(root / partner, partner, num_train=60, num_val=60)
    return root


def examples(root, partner, split="val"):
    """Of each picture its pixels, its annotations, and the masks of the squares."""
    coco = COCO(root / partner / f"{split}.json")
    for image_id, image in coco.imgs.items():
        pixels = np.asarray(Image.open(root / partner / split / image["file_name"])).astype(int)
        annotations = coco.imgToAnns[image_id]
        yield pixels, annotations, [coco.annToMask(a).astype(bool) for a in annotations]


def color(pixels, x, y):
    """Mean hue, saturation and value, 0 to 1, of a few pixels around a place: without the grain."""
    patch = pixels[round(y) - 2 : round(y) + 2, round(x) - 2 : round(x) + 2]
    return rgb_to_hsv(*patch.mean((0, 1)) / 255)


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


@pytest.mark.parametrize("partner", PARTNERS)
def test_all_discs_are_far_from_all_squares(root, partner):
    for pixels, _, squares in examples(root, partner):
        square_columns = np.nonzero(np.logical_or(*squares).any(0))[0]
        coloured = np.ptp(pixels, axis=2).max(0) > 12
        coloured[square_columns.min() - 1 : square_columns.max() + 2] = False
        disc_columns = np.nonzero(coloured)[0]
        gaps = abs(square_columns[:, None] - disc_columns) - 1
        assert gaps.min() >= MIN_GAP


def test_two_bright_and_two_dark_discs_in_validation(root):
    for pixels, annotations, _ in examples(root, "far"):
        assert sorted(map(is_bright, disc_colors(pixels, annotations))) == [False] * 2 + [True] * 2


def test_one_two_or_four_discs_in_training(root):
    counts = [
        len(disc_colors(p, annotations)) for p, annotations, _ in examples(root, "far", "train")
    ]
    assert set(counts) == set(TRAIN_COUNTS)
    assert min(counts.count(count) for count in TRAIN_COUNTS) >= 10


@pytest.mark.parametrize("split", ["train", "val"])
def test_partner_has_the_hue_of_the_square_and_its_value_is_the_class(root, split):
    for pixels, annotations, _ in examples(root, "far", split):
        for annotation in annotations:
            hue = color(pixels, *center(annotation))[0]
            x, y, radius = annotation["partner"]
            partner = color(pixels, x, y)
            assert hue_distance(hue, partner[0]) < 5 / 360
            assert is_bright(partner) == (annotation["category_id"] == 1)
            others = [c for c in disc_colors(pixels, annotations) if c != partner]
            assert sum(hue_distance(hue, other[0]) < 0.1 for other in others) <= 1  # the partner
            assert radius == 7.5


def hue_distance(one, other):
    """0 to 0.5, in turns."""
    return 0.5 - abs(abs(one - other) - 0.5)


def test_squares_have_different_partners_in_validation(root):
    for _, annotations, _ in examples(root, "far"):
        one, other = (a["partner"] for a in annotations)
        assert one != other


def test_squares_look_the_same_for_both_classes(root):
    """Their colours are of one saturation and brightness, whatever the class."""
    for pixels, annotations, _ in examples(root, "far"):
        for annotation in annotations:
            _, saturation, value = color(pixels, *center(annotation))
            assert [saturation, value] == pytest.approx([0.7, 0.82], abs=0.03)


def test_near_discs_show_the_class_on_the_square(root):
    for pixels, annotations, _ in examples(root, "near"):
        for annotation in annotations:
            disc = color(pixels, *center(annotation))
            assert is_bright(disc) == (annotation["category_id"] == 1)
            assert disc == pytest.approx(color(pixels, *annotation["partner"][:2]), abs=0.03)


def test_classes_ends_and_places_of_partners_are_balanced(root):
    found = [
        (a["category_id"], a["bbox"][0] < 128, a["partner"][1] < 16)
        for _, annotations, _ in examples(root, "far")
        for a in annotations
    ]
    assert len(found) == 120
    assert min(map(found.count, set(found))) >= 6
    assert len(set(found)) == 8


def test_squares_are_where_the_masks_are(root):
    for pixels, annotations, masks in examples(root, "far"):
        for annotation, mask in zip(annotations, masks):
            x, _, width, _ = annotation["bbox"]
            columns = np.nonzero(mask.any(0))[0]
            assert [columns[0], columns[-1] + 1] == pytest.approx([x, x + width], abs=1)
            assert (np.ptp(pixels, axis=2)[mask] > 12).mean() > 0.95
            side = (annotation["keypoints"][0] - x) / width
            assert side < 0.2 if annotation["category_id"] == 1 else side > 0.75


def test_both_sets_have_the_same_squares(root):
    texts = [(root / partner / "val.json").read_text().split('"images"')[1] for partner in PARTNERS]
    assert texts[0] == texts[1]


def test_pictures_differ_and_are_the_same_again(root, tmp_path):
    make_long_range_match(tmp_path / "far", "far", num_train=3, num_val=2)
    pictures = [path.read_bytes() for path in sorted((root / "far").glob("*/*.png"))]
    assert len(set(pictures)) == len(pictures) == 120
    for path in sorted((tmp_path / "far").glob("*/*.png")):
        first = np.asarray(Image.open(root / path.relative_to(tmp_path)))
        assert np.array_equal(np.asarray(Image.open(path)), first)
