import importlib
import json
import multiprocessing
import os
import time
from collections import Counter

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import BitMasks, PolygonMasks
from PIL import Image
from pycocotools.coco import COCO

import nl_detectron.data.toy
from nl_detectron.data.toy import make_shapes, register_shapes

CLASSES = ["ring", "triangle", "square"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes") / "shapes", num_train=8, num_val=100)


@pytest.fixture(scope="module")
def val(root):
    return COCO(root / "val.json")


@pytest.fixture
def registered(root):
    register_shapes(root)
    yield
    importlib.reload(nl_detectron.data.toy)


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


def test_pictures_differ_and_are_the_same_again(root, tmp_path):
    again = make_shapes(tmp_path / "again", num_train=8, num_val=10)
    assert (again / "train.json").read_bytes() == (root / "train.json").read_bytes()
    pictures = {split: pixels(root, split) for split in ("train", "val")}
    for split, whole in pictures.items():
        second = pixels(again, split)
        assert len(second) == {"train": 8, "val": 10}[split]
        assert all(np.array_equal(whole[name], second[name]) for name in second)
    images = {image.tobytes() for whole in pictures.values() for image in whole.values()}
    assert len(images) == 108


def _make_small(barrier, root):
    barrier.wait()
    make_shapes(root, num_train=20, num_val=20)


def test_processes_may_start_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(4)
    root = tmp_path / "cache" / "shapes"
    makers = [fork.Process(target=_make_small, args=(barrier, root)) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0] * 4
    assert [path.name for path in root.parent.iterdir()] == ["shapes"]  # and no drafts
    for split in ("train", "val"):
        listed = {
            i["file_name"] for i in json.loads((root / f"{split}.json").read_text())["images"]
        }
        assert listed == set(os.listdir(root / split))
        assert len(listed) == 20


def test_killed_make_leaves_no_half_made_set(tmp_path):
    root = tmp_path / "shapes"
    maker = multiprocessing.get_context("fork").Process(target=make_shapes, args=(root,))
    maker.start()
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("*/train/*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    maker.kill()
    maker.join(60)
    assert not root.exists()
    assert len(pixels(make_shapes(root, num_train=2, num_val=3))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]  # and no drafts


def test_failed_make_cleans_up(tmp_path, monkeypatch):
    def disk_full(self, path):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        make_shapes(tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []


def test_complete_set_is_kept_and_other_folders_are_refused(root, tmp_path):
    before = (root / "val.json").stat().st_mtime_ns
    assert make_shapes(root) == root
    assert (root / "val.json").stat().st_mtime_ns == before
    (tmp_path / "precious.txt").touch()
    with pytest.raises(FileExistsError, match="holds no shapes"):
        make_shapes(tmp_path)


def test_registered_in_detectron2s_cache(root, tmp_path):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FVCORE_CACHE", str(tmp_path))
        importlib.reload(nl_detectron.data.toy)  # registering twice does no harm
        assert list(tmp_path.rglob("*.png")) == []  # importing makes nothing
        make_shapes(tmp_path / "nl_detectron" / "shapes-v1", num_train=2, num_val=3)
        assert len(DatasetCatalog.get("shapes_train")) == 2
        assert len(DatasetCatalog.get("shapes_val")) == 3
    importlib.reload(nl_detectron.data.toy)


def test_metadata(registered):
    for name in ("shapes_train", "shapes_val"):
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == CLASSES
        records = DatasetCatalog.get(name)  # load_coco_json sets the same metadata, or raises
        assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}
        assert metadata.keypoint_names == ["head", "tail"]
        assert os.path.isfile(metadata.json_file)
        assert all(record["file_name"].startswith(metadata.image_root) for record in records)


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


def test_ground_truth_scores_one(registered, evaluate_ground_truth):
    results = evaluate_ground_truth("shapes_val", kpt_oks_sigmas=[0.05, 0.05])
    assert {task: results[task]["AP"] for task in results} == pytest.approx(
        {"bbox": 100, "segm": 100, "keypoints": 100}
    )


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
