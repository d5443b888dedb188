import hashlib
from dataclasses import replace

import pytest
import yaml

from lab.study.inputs import check_inputs
from lab.study.plan import StudyData, TrainingRun
from nl_detectron.data.toy.built_in import register_dataset


def run_with(tmp_path, weights, *datasets):
    config = {
        "VERSION": 2,
        "MODEL": {"WEIGHTS": weights},
        "DATASETS": {"TRAIN": list(datasets), "TEST": list(datasets)},
    }
    return TrainingRun("nl", 1, tmp_path, yaml.safe_dump(config))


def test_everything_that_is_missing_has_a_line(tmp_path):
    run = run_with(tmp_path, str(tmp_path / "none.pth"), "lvis_v1_val", "shapes_val", "shape_val")
    with pytest.raises(FileNotFoundError) as error:
        check_inputs([run])
    lvis, shape, weights = str(error.value).splitlines()
    assert "lvis_v1_val is not there: no" in lvis
    assert "DETECTRON2_DATASETS is" in lvis
    assert "shape_val is not registered; did you mean 'shapes_val'?" in shape
    assert "none.pth" in weights


def test_what_is_there_and_data_that_need_not_be_made_yet(tmp_path):
    weights = tmp_path / "model.pth"
    weights.touch()
    check_inputs([run_with(tmp_path, str(weights), "shapes_val"), run_with(tmp_path, "")])
    register_dataset("made_later", tmp_path / "none", lambda root: root, thing_classes=("a",))
    check_inputs([run_with(tmp_path, "", "made_later_train", "made_later_val")])


def test_weights_with_a_url_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="catalog://none, which cannot be had: "):
        check_inputs([run_with(tmp_path, "catalog://none")])


def test_files_of_the_plan_are_there_and_those_that_were_meant(tmp_path):
    files = {key: tmp_path / key for key in ("train_json", "val_json")}
    run = replace(run_with(tmp_path, "", "no_set"), data=StudyData(files, "a web page", {}))
    with pytest.raises(FileNotFoundError) as error:
        check_inputs([run])
    train, val, source = str(error.value).splitlines()
    assert train == f"data: train_json is {tmp_path / 'train_json'}, which does not exist"
    assert (val[:14], source) == ("data: val_json", "data: where to get it: a web page")
    for file in files.values():
        file.write_text("{}")
    check_inputs([run])
    sums = {"val_json": 64 * "0"}
    with pytest.raises(FileNotFoundError, match=r"val_json is .*, whose SHA-256 is not 0000"):
        check_inputs([replace(run, data=StudyData(files, "", sums))])
    sums = {"val_json": hashlib.sha256(b"{}").hexdigest()}
    check_inputs([replace(run, data=StudyData(files, "", sums))])
