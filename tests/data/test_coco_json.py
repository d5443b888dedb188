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
                "segmentation": [[40, 5, 50, 5, 50, 35, 40, 35]],
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


def rle_of(top, left, bottom, right, compressed):
    mask = np.zeros((48, 64), np.uint8, order="F")
    mask[top:bottom, left:right] = 1
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


IDS = {
    "UUIDs": ["6f1c-1", "6f1c-2", "6f1c-3"],
    "quoted from 0": ["0", "1", "2"],
    "beyond a float's digits": [2**53, 2**53 + 1, 2**53 + 2],
    "beyond floats": [10**400, 10**400 + 1, 10**400 + 2],
    "floats": [1.0, 2.0, 3.0],
    "from 0": [0, 1, 2],
    "negative": [-1, -2, -3],
    "the same": [5, 5, 5],
    "some null": [1, None, 2],
    "numbers and texts": [1, "2", 3],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_annotation_ids_are_numbered_anew(register, evaluate_ground_truth, ids):
    coco = hand_made_coco()
    for annotation, id_ in zip(coco["annotations"], ids):
        annotation["id"] = id_
    register(coco)
    assert [a["id"] for a in evaluated("mine")["annotations"]] == [1, 2, 3]
    assert aps_of(evaluate_ground_truth) == pytest.approx([100] * 3)


@pytest.mark.parametrize("ids", [["x", "y", "z"], [2**62 + 1, 2**63 - 1, 7], [-1, -5, -9]])
def test_image_ids_of_any_kind(register, evaluate_ground_truth, ids):
    coco = hand_made_coco()
    new = dict(zip([0, 5, 6], ids))
    for image in coco["images"]:
        image["id"] = new[image["id"]]
    for annotation in coco["annotations"]:
        annotation["image_id"] = new[annotation["image_id"]]
    register(coco)
    assert aps_of(evaluate_ground_truth) == pytest.approx([100] * 3)


@pytest.mark.parametrize("area", [0, 0.0, None, -1, -200.0, 1e10 + 1e4, 1e13])
def test_area_that_evaluation_would_not_count(register, evaluate_ground_truth, area, caplog):
    coco = hand_made_coco()
    for annotation in coco["annotations"]:
        annotation["area"] = area
    with caplog.at_level(logging.INFO):
        register(coco)
    assert "lacks area" in caplog.text
    areas = [annotation["area"] for annotation in evaluated("mine")["annotations"]]
    assert areas == pytest.approx([200, 300, 200], abs=15)
    assert aps_of(evaluate_ground_truth) == pytest.approx([100] * 3)


@pytest.mark.parametrize("area", [0.5, 1e10])
def test_area_that_evaluation_counts_stays(register, area):
    coco = hand_made_coco()
    coco["annotations"][1]["area"] = area
    register(coco)
    assert evaluated("mine")["annotations"][1]["area"] == area


@pytest.mark.parametrize("count", [0, None, 2])
def test_visible_keypoints_count(register, evaluate_ground_truth, count):
    coco = hand_made_coco()
    coco["annotations"][0]["num_keypoints"] = count
    register(coco)
    assert [a["num_keypoints"] for a in evaluated("mine")["annotations"]] == [count or 3, 0, 0]
    results = evaluate_ground_truth("mine", kpt_oks_sigmas=[0.05] * 3)
    assert results["keypoints"]["AP"] == pytest.approx(100)


def test_whole_sizes_written_as_floats(register, evaluate_ground_truth):
    coco = hand_made_coco()
    rle = rle_of(5, 40, 35, 50, compressed=True)
    coco["annotations"][1]["segmentation"] = rle | {"size": [48.0, 64.0]}
    rle = rle_of(0, 0, 10, 20, compressed=False)
    coco["annotations"][2]["segmentation"] = rle | {"size": [48.0, 64.0]}
    for image in coco["images"]:
        image.update(height=48.0, width=64.0)
    register(coco)
    records = DatasetCatalog.get("mine")
    assert {type(r[side]) for r in records for side in ("height", "width")} == {int}
    assert aps_of(evaluate_ground_truth) == pytest.approx([100] * 3)


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
    assert DatasetCatalog.get("mine") == first


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
            x, y, width, height = annotation["bbox"]
            annotation["segmentation"] = rle_of(
                y, x, y + height, x + width, compressed=segmentation == "compressed"
            )
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
    def apply(coco):
        coco[section][i].update(values)

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda coco: coco.pop("categories"), "no list 'categories'"),
        (lambda coco: coco["images"].append(3), r"images\[3\] is 3, not an object"),
        (change("images", 0, file_name=None), "file_name None, not a text"),
        (change("images", 0, height=0), "height 0, not an integer from 1 to"),
        (change("annotations", 0, bbox=[1, 2, "3", 4]), r"bbox \[1, 2, '3', 4\], not"),
        (change("annotations", 0, area="x"), "area 'x', not a number"),
        (change("annotations", 0, iscrowd=7), "iscrowd 7, not 0 or 1"),
        (change("annotations", 0, keypoints=["x"]), r"keypoints \['x'\], not a list of numbers"),
        (change("annotations", 0, segmentation=[[1e9] * 6]), "nor a list of polygons"),
        (change("annotations", 0, segmentation={"counts": [5]}), "not an RLE"),
        (
            change("annotations", 0, segmentation={"size": [48, 64], "counts": [5]}),
            "not an RLE",
        ),
        (
            change("annotations", 0, segmentation={"size": [48, 64], "counts": "oo"}),
            "not an RLE",
        ),
        (change("categories", 0, name=7), "name 7, not a text"),
        (lambda coco: coco.update(images={}), "no list 'images'"),
        (lambda coco: coco["categories"].clear(), "has no categories"),
        # What has no category at hand, VIA leaves out: the first cause first.
        (
            lambda coco: (coco["annotations"].clear(), coco["categories"].clear()),
            "has no categories",
        ),
        (lambda coco: coco["images"][1].pop("height"), r"images\[1\] has no 'height'"),
        (lambda coco: coco["annotations"][2].pop("bbox"), r"annotations\[2\] has no 'bbox'"),
        (change("annotations", 1, category_id=4), "category_id 4, not among the categories"),
        (change("annotations", 1, image_id="0"), "image_id '0', not among the images"),
        (change("annotations", 1, bbox=[1, 2]), r"bbox \[1, 2\], not \[x, y, width, height\]"),
        (change("annotations", 1, segmentation=TRIANGLE[0]), "nor a list of polygons"),
        (change("annotations", 1, segmentation=[[1, 1, 5, 5]]), "nor a list of polygons"),
        (change("annotations", 0, keypoints=[1, 1, 2]), "has 3 numbers in 'keypoints'"),
        (
            lambda coco: [a.update(bbox=[0.1, 0.2, 0.5, 0.5]) for a in coco["annotations"]],
            "COCO's are in pixels",
        ),
    ],
)
def test_explains_what_is_wrong_with_a_file(write, spoil, message):
    json_file, image_root = write(hand_made_coco())
    coco = hand_made_coco()
    spoil(coco)
    json_file.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=message) as error:
        register_coco_json("mine", json_file, image_root)
    assert str(json_file) in str(error.value)
    assert "mine" not in DatasetCatalog


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{images: []}", "is not JSON"),
        ("", "is not JSON"),
        ("[1, 2]", r"is not in COCO's format: it has no list 'categories', but is \[1, 2\]"),
        ('{"_via_settings": {}, "_via_img_metadata": {}}', "with the keys '_via_settings', '_via"),
        ('{"shapes": [], "imagePath": "1.png"}', "with the keys 'shapes', 'imagePath'"),
    ],
)
def test_explains_files_of_another_format(tmp_path, text, message):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        register_coco_json("mine", tmp_path / "mine.json", tmp_path)


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
    rle = rle_of(5, 40, 35, 50, compressed=False)
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


def crowds_alone(coco):
    for annotation in coco["annotations"]:
        annotation["iscrowd"] = 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda coco: coco["annotations"].clear(), "'mine' has no annotations"),
        (lambda coco: coco.pop("annotations"), "'mine' has no annotations"),
        (crowds_alone, "all 3 annotations of 'mine' have iscrowd 1"),
    ],
)
def test_what_cannot_be_trained_on_can_be_evaluated_on(register, cfg, spoil, message, tmp_path):
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


def without_person_keypoints(coco):
    del coco["categories"][0]["keypoints"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_person_keypoints, "no category of 'mine' has a list 'keypoints'"),
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
