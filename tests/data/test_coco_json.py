import json
import logging
from copy import deepcopy
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import load_coco_json
from PIL import Image

from nl_detectron.data import (
    CompletingCOCOEvaluator,
    configure_for_dataset,
    register_coco_json,
)
from tests.corruption import read_corrupted
from tests.data.conftest import as_prediction

COCO_SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco"
PERSON = {
    "id": 7,
    "name": "person",
    "keypoints": ["nose", "left_hand", "right_hand"],
    "skeleton": [[1, 2], [1, 3]],
}
TRIANGLE = [[10, 10, 30, 10, 30, 30]]


def hand_made_coco():
    """As people write it: ids from 0 and with gaps, no area or iscrowd, keypoints on some."""
    return {
        "images": [
            {"id": 0, "file_name": "a.png", "height": 48, "width": 64},
            {"id": 5, "file_name": "sub/folder/b.png", "height": 48, "width": 64},
            {"id": 6, "file_name": "unlabelled.png", "height": 48, "width": 64},
        ],
        "annotations": [
            {
                "id": 0,
                "image_id": 0,
                "category_id": 7,
                "bbox": [10, 10, 20, 20],
                "segmentation": TRIANGLE,
                "keypoints": [12, 11, 2, 20, 15, 2, 28, 25, 1],
            },
            {
                "id": 1,
                "image_id": 0,
                "category_id": 3,
                "bbox": [40, 5, 10, 30],
                "segmentation": [
                    [40, 5, 50, 5, 50, 20, 40, 20],
                    [40, 20, 50, 20, 50, 35, 40, 35],
                ],
            },
            {
                "id": 2,
                "image_id": 5,
                "category_id": 3,
                "bbox": [0, 0, 20, 10],
                "segmentation": [[0, 0, 20, 0, 20, 10, 0, 10]],
            },
        ],
        "categories": [deepcopy(PERSON), {"id": 3, "name": "dog"}],
    }


def rle_of(bbox, compressed):
    """The mask of a box."""
    x, y, width, height = bbox
    mask = np.zeros((48, 64), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    if compressed:
        rle = mask_util.encode(mask)
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    first = [0] * int(flat[0])
    return {"size": [48, 64], "counts": first + np.diff([0, *changes, flat.size]).tolist()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    """Write a dataset and its images; return the JSON file and the image folder."""

    def write(coco, name="mine"):
        for image in coco["images"]:
            path = tmp_path / "images" / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (int(image["width"]), int(image["height"]))).save(path)
        json_file = tmp_path / f"{name}.json"
        json_file.write_text(json.dumps(coco))
        return json_file, tmp_path / "images"

    return write


@pytest.fixture
def forget():
    yield
    for name in ("mine", "mine_val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def register(write, forget):
    def register(coco, name="mine"):
        register_coco_json(name, *write(coco, name))

    return register


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    return cfg


def test_registers_metadata_and_records(register):
    register(hand_made_coco())
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["dog", "person"]
    assert metadata.keypoint_names == PERSON["keypoints"]
    assert metadata.keypoint_flip_map == [("left_hand", "right_hand")]
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [
        ("nose", "left_hand"),
        ("nose", "right_hand"),
    ]
    records = DatasetCatalog.get("mine")
    assert [len(record["annotations"]) for record in records] == [2, 1, 0]
    assert [a["category_id"] for a in records[0]["annotations"]] == [1, 0]
    assert records[1]["file_name"].endswith("images/sub/folder/b.png")
    assert all(len(a["keypoints"]) == 9 for r in records for a in r["annotations"])


def aps_of(evaluate_ground_truth):
    results = evaluate_ground_truth("mine", kpt_oks_sigmas=[0.05] * 3)
    return [result["AP"] for result in results.values()]


def evaluated(name):
    """What the evaluation of a registered dataset reads."""
    return CompletingCOCOEvaluator(name, distributed=False)._coco_api.dataset


def test_fills_in_what_evaluation_reads(register, tmp_path, caplog):
    coco = hand_made_coco()
    with caplog.at_level(logging.INFO):
        register(coco)
    assert "area, distinct ids from 1, info, iscrowd, keypoints, num_keypoints" in caplog.text
    completed = evaluated("mine")
    assert json.loads((tmp_path / "mine.json").read_text()) == coco  # the user's file stays
    assert not (tmp_path / "cache").exists()
    assert [a["id"] for a in completed["annotations"]] == [1, 2, 3]
    assert [a["num_keypoints"] for a in completed["annotations"]] == [3, 0, 0]
    assert [a["area"] for a in completed["annotations"]] == pytest.approx([200, 300, 200], abs=15)


def each(section, key, values):
    """Set a key of the three entries of a section, and what points to it."""

    def apply(coco):
        new = {}
        for entry, value in zip(coco[section], values):
            new[entry.get(key)] = entry[key] = value
        if section == "images" and key == "id":
            for annotation in coco["annotations"]:
                annotation["image_id"] = new[annotation["image_id"]]

    return apply


def whole_sizes_as_floats(coco):
    for image in coco["images"]:
        image.update(height=48.0, width=64.0)
    for annotation, is_compressed in (
        (coco["annotations"][1], True),
        (coco["annotations"][2], False),
    ):
        rle = rle_of(annotation["bbox"], is_compressed)
        annotation["segmentation"] = rle | {"size": [48.0, 64.0]}


ANNOTATION_IDS = [
    ["6f1c-1", "6f1c-2", "6f1c-3"],
    ["0", "1", "2"],
    [2**53, 2**53 + 1, 2**53 + 2],  # beyond a float's digits
    [10**400, 10**400 + 1, 10**400 + 2],
    [1.0, 2.0, 3.0],
    [0, 1, 2],
    [-1, -2, -3],
    [5, 5, 5],
    [1, None, 2],
    [1, "2", 3],
]
IMAGE_IDS = [["x", "y", "z"], [2**62 + 1, 2**63 - 1, 7], [-1, -5, -9]]
AREAS = [0, None, -200.0, 1e10 + 1e4]  # which evaluation would not count
ODD = {
    **{f"ids {str(ids)[:20]}": each("annotations", "id", ids) for ids in ANNOTATION_IDS},
    **{f"image ids {ids}": each("images", "id", ids) for ids in IMAGE_IDS},
    **{f"area {area}": each("annotations", "area", [area] * 3) for area in AREAS},
    **{f"num {n}": each("annotations", "num_keypoints", [n]) for n in (0, None)},
    "whole sizes as floats": whole_sizes_as_floats,
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_odd_values_are_evaluated_as_they_are_meant(register, evaluate_ground_truth, change):
    coco = hand_made_coco()
    change(coco)
    register(coco)
    annotations = evaluated("mine")["annotations"]
    assert [a["id"] for a in annotations] == [1, 2, 3]
    assert [a["num_keypoints"] for a in annotations] == [3, 0, 0]
    assert [a["area"] for a in annotations] == pytest.approx([200, 300, 200], abs=15)
    masks = [a["segmentation"] for a in annotations if isinstance(a["segmentation"], dict)]
    assert all(type(side) is int for mask in masks for side in mask["size"])
    records = DatasetCatalog.get("mine")
    assert {type(r[side]) for r in records for side in ("height", "width")} == {int}
    assert [r["image_id"] for r in records] == sorted(image["id"] for image in coco["images"])
    assert aps_of(evaluate_ground_truth) == pytest.approx([100] * 3)


@pytest.mark.parametrize(("key", "value"), [("area", 0.5), ("area", 1e10), ("num_keypoints", 2)])
def test_what_evaluation_counts_stays(register, key, value):
    coco = hand_made_coco()
    coco["annotations"][0][key] = value
    register(coco)
    assert evaluated("mine")["annotations"][0][key] == value


def test_complete_file_is_used_as_it_is(register, tmp_path, caplog):
    caplog.set_level("INFO", "nl_detectron")
    register(hand_made_coco())
    assert "lacks" in caplog.text
    completed = evaluated("mine")
    caplog.clear()
    register(completed)
    assert MetadataCatalog.get("mine").json_file == str(tmp_path / "mine.json")
    assert "lacks" not in caplog.text
    assert evaluated("mine") == completed


@pytest.mark.parametrize("kind", ["instances", "person_keypoints"])
def test_records_are_those_of_detectron2(kind, forget):
    if not COCO_SAMPLE.is_dir():
        pytest.skip("there is no sample of COCO")
    json_file = COCO_SAMPLE / "annotations" / f"{kind}_val2017.json"
    register_coco_json("mine", json_file, COCO_SAMPLE / "val2017", pictures="decoded")
    ours, metadata = DatasetCatalog.get("mine"), MetadataCatalog.get("mine")
    assert ours == load_coco_json(str(json_file), str(COCO_SAMPLE / "val2017"), "mine_val")
    theirs = MetadataCatalog.get("mine_val")
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert metadata.get(key) == theirs.get(key)


def test_kept_records_are_handed_over_once(write, forget, monkeypatch):
    register_coco_json("mine", *write(hand_made_coco()), keep_records=True)
    with monkeypatch.context() as context:
        context.setattr("nl_detectron.data.coco_json.read_coco", None)  # the file is not read again
        first = DatasetCatalog.get("mine")
    again = DatasetCatalog.get("mine")
    assert again == first
    assert again is not first


@pytest.mark.parametrize("with_keypoints", [True, False])
@pytest.mark.parametrize("segmentation", ["polygons", "compressed", "uncompressed", None])
def test_ground_truth_scores_one(register, evaluate_ground_truth, with_keypoints, segmentation):
    coco = hand_made_coco()
    if not with_keypoints:
        coco["categories"][0] = {"id": 7, "name": "person"}
        del coco["annotations"][0]["keypoints"]
    for annotation in coco["annotations"]:
        if segmentation is None:
            del annotation["segmentation"]
        elif segmentation != "polygons":
            annotation["segmentation"] = rle_of(annotation["bbox"], segmentation == "compressed")
    register(coco)
    results = evaluate_ground_truth("mine", kpt_oks_sigmas=[0.05] * 3)
    assert ("segm" in results) == (segmentation is not None)
    assert ("keypoints" in results) == with_keypoints
    assert [results[task]["AP"] for task in results] == pytest.approx([100] * len(results))


def test_registering_again_replaces(register):
    register(hand_made_coco())
    assert len(DatasetCatalog.get("mine")) == 3
    coco = hand_made_coco()
    coco["categories"][0]["name"] = "human"
    coco["images"].pop()
    register(coco)
    assert len(DatasetCatalog.get("mine")) == 2
    assert MetadataCatalog.get("mine").thing_classes == ["dog", "human"]


def change(section, i, **values):
    return lambda coco: coco[section][i].update(values)


def emptied(*sections):
    return json.dumps(hand_made_coco() | {key: [] for key in sections})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{images: []}", "is not JSON"),
        ("", "is not JSON"),
        ("[1, 2]", r"is not in COCO's format: it has no list 'categories', but is \[1, 2\]"),
        ("{}", "it has no list 'categories', but is {}"),
        ('{"_via_settings": {}, "_via_img_metadata": {}}', "with the keys '_via_settings', '_via"),
        ('{"shapes": [], "imagePath": "1.png"}', "with the keys 'shapes', 'imagePath'"),
        ('{"categories": [{}], "images": {}}', "no list 'images'"),
        (emptied("images"), "has no images"),
        (emptied("categories"), "has no categories"),
        # What has no category at hand, VIA leaves out: the first cause first.
        (emptied("annotations", "categories"), "has no categories"),
    ],
)
def test_explains_files_of_another_format(tmp_path, text, message):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.json.* {message}"):
        register_coco_json("mine", tmp_path / "mine.json", tmp_path)
    assert "mine" not in DatasetCatalog


def test_corrupt_files(write, cfg, tmp_path):
    json_file, image_root = write(hand_made_coco())
    folder = tmp_path / "corrupt"
    folder.mkdir()

    def read(path):
        register_coco_json(str(path), path, image_root)  # the name, for configure_for_dataset
        configure_for_dataset(cfg, str(path), str(path))

    content = json_file.read_bytes()
    errors = (ValueError, FileNotFoundError)
    num_refused = read_corrupted(content, folder / "mine.json", read, errors)
    assert num_refused > 100


def test_explains_missing_files(write, tmp_path):
    json_file, image_root = write(hand_made_coco())
    with pytest.raises(FileNotFoundError, match=r"annotation file .*other\.json does not exist"):
        register_coco_json("mine", tmp_path / "other.json", image_root)
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere does not exist"):
        register_coco_json("mine", json_file, tmp_path / "nowhere")
    (image_root / "sub/folder/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"'sub/folder/b\.png' \(id 5\) is not in"):
        register_coco_json("mine", json_file, image_root)


def test_configure(register, cfg, caplog):
    register(hand_made_coco())
    register(hand_made_coco(), "mine_val")
    with caplog.at_level(logging.INFO):
        configure_for_dataset(cfg, "mine", "mine_val")
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("mine",), ("mine_val",))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
    assert cfg.TEST.KEYPOINT_OKS_SIGMAS == [0.05] * 3
    assert cfg.INPUT.MASK_FORMAT == "polygon"
    assert "2 classes (dog, person), mask format polygon, 3 keypoints" in caplog.text


@pytest.mark.parametrize(
    ("num_keypoints", "stale", "expected"),
    [
        (3, [0.02] * 4, [0.05] * 3),
        (3, [0.02] * 2, [0.05] * 3),
        (17, [0.02] * 3, []),
        (17, [0.02] * 17, [0.02] * 17),
        (17, [], []),
        (3, [0.02, 0.07, 0.07], [0.02, 0.07, 0.07]),
    ],
)
def test_configure_replaces_sigmas_of_another_length(register, cfg, num_keypoints, stale, expected):
    coco = hand_made_coco()
    coco["categories"][0].update(keypoints=[f"point {i}" for i in range(num_keypoints)])
    coco["annotations"][0]["keypoints"] = [15, 12, 2] * num_keypoints
    register(coco)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = stale
    configure_for_dataset(cfg, "mine", "mine")
    assert num_keypoints == cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    assert expected == cfg.TEST.KEYPOINT_OKS_SIGMAS


@pytest.mark.parametrize(("is_crowd", "mask_format"), [(0, "bitmask"), (1, "polygon")])
def test_configured_training_data_load(register, cfg, is_crowd, mask_format):
    """Also with keypoints in one category only, RLE masks and an image without annotations."""
    coco = hand_made_coco()
    rle = rle_of([40, 5, 10, 30], compressed=False)
    coco["annotations"][1].update(segmentation=rle, iscrowd=is_crowd)
    register(coco)
    configure_for_dataset(cfg, "mine", "mine")
    assert mask_format == cfg.INPUT.MASK_FORMAT
    mapper = DatasetMapper(cfg, is_train=True)
    records = get_detection_dataset_dicts("mine")
    instances = [mapper(record)["instances"] for record in records]
    assert [len(x) for x in instances] == [2 - is_crowd, 1]
    assert [tuple(x.gt_keypoints.tensor.shape) for x in instances] == [
        (2 - is_crowd, 3, 3),
        (1, 3, 3),
    ]
    assert all(x.gt_masks.nonempty().all() for x in instances)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda coco: coco["annotations"].clear(), "'mine' has no annotations"),
        (lambda coco: coco.pop("annotations"), "'mine' has no annotations"),
        (
            lambda coco: [a.update(iscrowd=1) for a in coco["annotations"]],
            "all 3 annotations of 'mine' have iscrowd 1",
        ),
    ],
)
def test_what_cannot_be_trained_on_can_be_evaluated_on(register, cfg, spoil, message):
    register(hand_made_coco(), "mine_val")
    coco = hand_made_coco()
    spoil(coco)
    register(coco)
    cfg.MODEL.KEYPOINT_ON = "iscrowd" not in message
    with pytest.raises(ValueError, match=message):
        configure_for_dataset(cfg, "mine", "mine")
    configure_for_dataset(cfg, "mine_val", "mine")
    configure_for_dataset(cfg, "mine", "mine", eval_only=True)
    assert cfg.DATASETS.TEST == ("mine",)
    assert len(DatasetCatalog.get("mine")) == 3


@pytest.mark.parametrize(
    "spoil", [lambda coco: coco["annotations"].clear(), lambda coco: coco.pop("annotations")]
)
def test_predictions_without_annotations_are_written(register, spoil, tmp_path, caplog):
    coco = hand_made_coco()
    register(coco)
    (record, *_) = DatasetCatalog.get("mine")
    prediction = as_prediction(record)
    spoil(coco)
    with caplog.at_level(logging.WARNING):
        register(coco)
        assert "no annotations: none to train on, and in evaluation no AP" in caplog.text
        evaluator = CompletingCOCOEvaluator("mine", distributed=False, output_dir=str(tmp_path))
        evaluator.reset()
        evaluator.process([record], [{"instances": prediction}])
        assert evaluator.evaluate() == {}
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [entry["category_id"] for entry in written] == [7, 3]


def test_keypoints_do_not_matter_to_a_model_of_boxes(register, cfg):
    coco = hand_made_coco()
    coco["categories"][1]["keypoints"] = ["tail"]
    coco["categories"][0]["skeleton"] = [[0, 1]]
    register(coco)
    register(hand_made_coco(), "mine_val")
    cfg.MODEL.KEYPOINT_ON = False
    configure_for_dataset(cfg, "mine", "mine_val")
    mapper = DatasetMapper(cfg, is_train=True)
    assert [len(mapper(r)["instances"]) for r in get_detection_dataset_dicts("mine")] == [2, 1]


def test_the_pairs_of_keypoints_are_logged(register, caplog):
    caplog.set_level("INFO", "nl_detectron")
    coco = hand_made_coco()
    coco["categories"][0]["keypoints"] = ["nose", "handR", "handL"]
    register(coco)
    assert "swap places in a flip: handL - handR" in caplog.text
    assert MetadataCatalog.get("mine").keypoint_flip_map == [("handL", "handR")]
    assert len(MetadataCatalog.get("mine").keypoint_connection_rules) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("categories", 0, keypoints=None), "no category of 'mine' has a list 'keypoints'"),
        (change("annotations", 0, keypoints=[0] * 9), "visibility above 0"),
        (change("annotations", 1, segmentation=[]), "1 of 3 annotations of 'mine' have no segm"),
        (change("categories", 1, keypoints=["tail"]), "or categories have different ones"),
        (change("categories", 0, keypoints=["hand", "nose", "hand"]), "have the same name"),
    ],
)
def test_configure_explains_what_the_model_lacks(register, cfg, spoil, message):
    coco = hand_made_coco()
    spoil(coco)
    register(coco)
    with pytest.raises(ValueError, match=message):
        configure_for_dataset(cfg, "mine", "mine")
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
    configure_for_dataset(cfg, "mine", "mine")


def test_evaluation_needs_nothing_of_the_training_set(register, cfg):
    coco = hand_made_coco()
    coco["annotations"][1]["segmentation"] = []
    register(coco)
    register(hand_made_coco(), "mine_val")
    configure_for_dataset(cfg, "mine", "mine_val", eval_only=True)


@pytest.mark.parametrize(
    ("spoil", "key"),
    [
        (change("categories", 1, name="cat"), "thing_classes"),
        (change("categories", 0, keypoints=["nose", "tail", "hand"]), "keypoint_names"),
    ],
)
def test_configure_refuses_different_categories(register, cfg, spoil, key):
    register(hand_made_coco())
    other = hand_made_coco()
    spoil(other)
    register(other, "mine_val")
    with pytest.raises(ValueError, match=f"'mine' and 'mine_val' differ in their {key}"):
        configure_for_dataset(cfg, "mine", "mine_val")
