import pytest
import yaml

from lab.study.inputs import check_inputs
from lab.study.plan import TrainingRun
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


def test_data_and_weights_that_are_there(tmp_path):
    weights = tmp_path / "model.pth"
    weights.touch()
    check_inputs([run_with(tmp_path, str(weights), "shapes_val"), run_with(tmp_path, "")])


def test_built_in_data_need_not_be_made_yet(tmp_path):
    register_dataset("made_later", tmp_path / "none", lambda root: root, thing_classes=("a",))
    check_inputs([run_with(tmp_path, "", "made_later_train", "made_later_val")])


def test_weights_with_a_url_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="catalog://none, which cannot be had: "):
        check_inputs([run_with(tmp_path, "catalog://none")])
