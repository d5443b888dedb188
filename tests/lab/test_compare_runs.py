import json
import re

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog

from lab import compare_runs
from nl_detectron.config import build_config
from nl_detectron.data import register_coco_json
from tests.commands import error_of
from tests.random_model import QUICK_START

A, B = [4, 4, 20, 20], [34, 4, 24, 20]
OVERRIDES = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "TEST.KEYPOINT_OKS_SIGMAS", "[0.05, 0.05]"]


def thing(image_id, category_id, box, **more):
    x, y, w, h = box
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    keypoints = [x, y, 2, x + w, y + h, 2]
    more = {"segmentation": [corners], "keypoints": keypoints, **more}
    return {"image_id": image_id, "category_id": category_id, "bbox": box, **more}


@pytest.fixture
def runs(tmp_path):
    """Two runs on ten pictures: A confuses the classes in seven of them, and B in another one."""
    objects = [thing(i, c, box) for i in range(1, 11) for c, box in ((1, A), (2, B))]
    (tmp_path / "val").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in range(1, 11)]
    for image in images:
        cv2.imwrite(str(tmp_path / "val" / image["file_name"]), np.full((48, 64, 3), 90, np.uint8))
    categories = [
        {"id": i, "name": name, "keypoints": ["top", "bottom"]}
        for i, name in enumerate(("red", "blue"), start=1)
    ]
    coco = {"images": images, "annotations": objects, "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(coco))
    register_coco_json("compared", tmp_path / "val.json", tmp_path / "val")
    for name, wrong in (("a", range(1, 8)), ("b", [9])):
        found = [
            thing(o["image_id"], 3 - c if o["image_id"] in wrong else c, o["bbox"], score=0.9)
            for o in objects
            for c in (o["category_id"],)
        ]
        for prediction in found:
            del prediction["segmentation"]
        write_run(tmp_path / name, found)
    yield tmp_path / "a", tmp_path / "b"
    DatasetCatalog.remove("compared")


def write_run(folder, predictions, *overrides):
    (folder / "inference").mkdir(parents=True, exist_ok=True)
    (folder / compare_runs.PREDICTIONS).write_text(json.dumps(predictions))
    cfg = build_config(QUICK_START, [*OVERRIDES, "DATASETS.TEST", "('compared',)", *overrides])
    (folder / "config.yaml").write_text(cfg.dump())


def main(*words):
    compare_runs.main([str(word) for word in words])


def test_aps_errors_and_pictures(runs, tmp_path, capsys):
    pytest.importorskip("tidecv")
    main(*runs, "--resamples", 50, "--json", tmp_path / "c.json", "--output", tmp_path / "page")
    out = capsys.readouterr().out
    assert "bbox on compared, 10 pictures, 50 resamples" in out
    assert "B removes most of: another class" in out
    assert "red taken for blue: 7 to 1 objects" in out
    assert "B adds no kind of error." in out
    figures = json.loads((tmp_path / "c.json").read_text())
    difference = figures["APs"]["AP-red"]
    assert difference["low"] < difference["b"] - difference["a"] < difference["high"]
    assert figures["errors"]["a"]["confusions"] == [["red", "blue", 7], ["blue", "red", 7]]
    assert f"{difference['a']:.1f}" in out
    page = (tmp_path / "page" / "index.html").read_text()
    assert re.findall("<h2>(.*)</h2>", page) == [
        "Pictures that B wins: 7",
        "Pictures that B loses: 1",
    ]
    assert re.findall(r"<figcaption>(\d+).png", page) == [*"1234567", "9"]
    assert page.count("data:image/jpeg;base64,") == 8
    assert "http" not in page
    assert "score of at least 50%" in page
    main(runs[1], runs[0], "--resamples", 5)
    worse = capsys.readouterr().out
    assert "B removes no kind of error. B adds most of: another class" in worse
    assert "red taken for blue: 1 to 7 objects" in worse


def test_keypoints_have_aps_but_no_kinds_of_errors(runs, capsys):
    main(*runs, "--task", "keypoints", "--resamples", 5)
    out = capsys.readouterr().out
    assert "AP-blue" in out
    assert "another class" not in out


def test_model_that_finds_nothing(runs, capsys):
    write_run(runs[0], [])
    main(*runs, "--resamples", 5, "--no-errors", "--output", runs[0] / "page")
    assert re.search(r"^AP +0\.0 ", capsys.readouterr().out, re.MULTILINE)
    assert "wins: 9" in (runs[0] / "page" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none", "{b}"], "none/config.yaml does not exist"),
        (["{a}", "{empty}"], "coco_instances_results.json does not exist; an evaluation writes it"),
        (["{a}", "{broken}"], "coco_instances_results.json is not JSON"),
        (["{a}", "{other}"], "was evaluated on ('compared',), "),
        (["{unknown}", "{unknown}"], "DATASETS.TEST is 'compare', but must be one of"),
        (["{a}", "{b}", "--task", "segm"], "--task is segm, but "),
        (["{a}", "{b}", "--resamples", "0"], "'0' is not a whole number above 0"),
    ],
)
def test_errors_of_the_user(words, message, runs, tmp_path, capsys):
    folders = {name: tmp_path / name for name in ("a", "b", "empty", "broken", "other", "unknown")}
    for name in ("empty", "broken"):
        write_run(folders[name], [])
    (folders["empty"] / compare_runs.PREDICTIONS).unlink()
    (folders["broken"] / compare_runs.PREDICTIONS).write_text("[")
    write_run(folders["other"], [], "DATASETS.TEST", "('shapes_val',)")
    write_run(folders["unknown"], [], "DATASETS.TEST", "('compare',)")
    words = [word.format(**folders) for word in words]
    assert message in error_of(capsys, compare_runs.main, *words)
