"""What is in the pictures of shapes_*."""

from collections import Counter

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.structures import BitMasks, PolygonMasks
from PIL import Image
from pycocotools.coco import COCO


@pytest.fixture(scope="module")
def root(roots):
    return roots / "shapes"


@pytest.fixture(scope="module")
def val(root):
    return COCO(root / "val.json")


@pytest.fixture
def name():
    return "shapes"


def pixels(root, split="val"):
    return {
        path.name: np.asarray(Image.open(path)).astype(int)
        for path in sorted((root / split).iterdir())
    }


def objects(coco):
    return [a for a in coco.anns.values() if not a["iscrowd"]]


def erode(mask):
    """Take one pixel off the border of a mask, diagonally too."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    shifts = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.logical_and.reduce(shifts)


def test_variety(root, val):
    images = pixels(root)
    assert len(images) == len(val.imgs) == 100
    for image in val.imgs.values():
        assert images[image["file_name"]].shape == (image["height"], image["width"], 3)
    assert len({image.shape for image in images.values()}) >= 4
    areas = np.array([a["area"] for a in objects(val)])
    visibilities = Counter(v for a in objects(val) for v in a["keypoints"][2::3])
    crowds = [a for a in val.anns.values() if a["iscrowd"]]
    per_class = Counter(a["category_id"] for a in objects(val))
    per_image = Counter(a["image_id"] for a in objects(val))
    assert np.histogram(areas, [0, 32**2, 96**2, 1e5])[0].min() >= 2  # COCO's area bands
    assert min(visibilities[v] for v in (0, 1, 2)) >= 10
    assert 5 <= len(crowds) <= 20
    assert min(per_class[i] for i in (1, 2, 3)) >= 40
    assert per_image.keys() == val.imgs.keys()
    assert set(per_image.values()) == {1, 2, 3, 4}


def test_annotations_agree_with_themselves(val):
    for annotation in val.anns.values():
        mask = val.annToMask(annotation)
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        x, y, width, height = annotation["bbox"]
        tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.allclose([x, y, x + width, y + height], tight, atol=2)
        outline = mask.sum() - erode(mask).sum()
        assert abs(mask.sum() - annotation["area"]) <= 0.15 * outline + 2
        assert isinstance(annotation["segmentation"], dict) == bool(annotation["iscrowd"])
        assert annotation["num_keypoints"] == sum(v > 0 for v in annotation["keypoints"][2::3])


def test_polygons_match_pixels(root, val):
    """All of an object's colour lies in its mask (no seams), and nothing else lies there."""
    images = pixels(root)
    for annotation in objects(val):
        image = images[val.imgs[annotation["image_id"]]["file_name"]]
        mask = val.annToMask(annotation).astype(bool)
        color = np.median(image[erode(mask)], axis=0)
        has_color = (abs(image - color) <= 6).all(axis=2)
        assert not (has_color & ~mask).any()

        keypoints = np.array(annotation["keypoints"]).reshape(2, 3)
        if (keypoints[:, 2] > 0).all():
            mark_radius = max(1.7, 0.2 * np.linalg.norm(keypoints[0] - keypoints[1]))
            rows, columns = np.indices(mask.shape)
            for x, y, _ in keypoints:
                mask &= np.hypot(columns - x, rows - y) > mark_radius + 1
            assert has_color[erode(mask)].mean() > 0.99  # nearer tips may be thinner than a pixel


def test_holes_show_the_background(val):
    rings = [a for a in objects(val) if a["category_id"] == 1 and a["num_keypoints"] == 2]
    centers = [np.array(a["keypoints"]).reshape(2, 3)[:, :2].mean(axis=0) for a in rings]
    for ring, (x, y) in zip(rings, centers):
        assert not val.annToMask(ring)[round(y), round(x)]


def test_visible_keypoints_are_a_light_and_a_dark_dot(root, val):
    images = pixels(root)
    for annotation in objects(val):
        image = images[val.imgs[annotation["image_id"]]["file_name"]]
        head, tail = np.reshape(annotation["keypoints"], (2, 3))
        for (x, y, visibility), is_light in ((head, True), (tail, False)):
            if visibility == 2:
                dot = image[round(y), round(x)]
                assert dot.min() > 150 if is_light else dot.max() < 150


@pytest.mark.parametrize(
    ("mask_format", "kind"), [("polygon", PolygonMasks), ("bitmask", BitMasks)]
)
def test_detectron2s_mapper(registered, mask_format, kind):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    cfg.INPUT.MASK_FORMAT = mask_format
    cfg.INPUT.MIN_SIZE_TRAIN = (128, 160)
    cfg.DATASETS.TRAIN = ("shapes_train",)
    mapper = DatasetMapper(cfg, is_train=True)
    for record in DatasetCatalog.get("shapes_val")[:40]:
        instances = mapper(record)["instances"]
        assert len(instances) == sum(not a["iscrowd"] for a in record["annotations"])
        assert isinstance(instances.gt_masks, kind)
        assert instances.gt_masks.nonempty().all()
        assert instances.gt_keypoints.tensor.shape == (len(instances), 2, 3)
