"""The configs by name, from a checkout and from a wheel."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from nl_detectron import NonLocalBlock, model_zoo
from nl_detectron.weights.checkpoint_io import CheckpointError, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
NAME = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x"


def test_lists_every_config_but_the_bases():
    folder = ROOT / "configs"
    files = [p for p in folder.rglob("*") if p.suffix in (".yaml", ".py") and "Base" not in p.name]
    assert model_zoo.list_configs() == sorted(p.relative_to(folder).as_posix() for p in files)


@pytest.mark.parametrize("name", model_zoo.list_configs())
def test_every_config_loads(name):
    assert Path(model_zoo.get_config_file(name)).is_file()
    assert model_zoo.get_config(name) is not None


def test_kinds_of_configs():
    assert model_zoo.get_config(NAME) == model_zoo.get_config(f"{NAME}.yaml")
    assert model_zoo.get_config(NAME).MODEL.BACKBONE.NAME == "build_nonlocal_backbone"
    assert isinstance(model_zoo.get_config(f"{NAME}.py"), DictConfig)


@pytest.mark.parametrize("name", [f"{NAME}x", "mask_rcnn_R_50_FPN_nl_1x.yaml", "../setup.py"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="There is no config") as error:
        model_zoo.get_config(name)
    assert repr(name) in str(error.value)
    if name != "../setup.py":
        assert f"did you mean '{NAME}.yaml'?" in str(error.value)


def test_model_with_weights(tmp_path):
    path = tmp_path / "model.pth"
    model = model_zoo.get_model("quick_start", device="cpu")
    assert model.training
    assert any(isinstance(module, NonLocalBlock) for module in model.modules())
    save_checkpoint(model.state_dict(), path)
    again = model_zoo.get_model("quick_start", weights=str(path), device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_model_by_a_lazy_config_is_on_its_device():
    with torch.device("meta"):
        model = model_zoo.get_model(f"{NAME}.py", device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        model_zoo.get_model("quick_start", weights=str(path), device="cpu")


def test_weights_of_the_config(monkeypatch):
    loaded = []
    load = "nl_detectron.model_zoo.NonLocalCheckpointer.load"
    monkeypatch.setattr(load, lambda self, path: loaded.append(path))
    monkeypatch.setattr("nl_detectron.model_zoo.check_weights_exist", lambda *_: None)
    model_zoo.get_model("quick_start", weights="config", device="cpu")  # starts from scratch
    with torch.device("meta"):
        model_zoo.get_model(f"{NAME}.py", weights="config", device="meta")
    assert loaded == ["detectron2://ImageNetPretrained/MSRA/R-50.pkl"]


def test_the_page_of_trained_detectors_has_each_of_them():
    page = (ROOT / "docs" / "MODEL_ZOO.md").read_text(encoding="utf-8")
    rows = model_zoo.list_trained()
    assert len(rows) > 40
    for row in rows:
        columns = [f"{row['model']}, {row['schedule']}", row.get("block", "-"), row["box_ap"]]
        columns += [row.get("mask_ap", "-"), f"`{row['file']}`"]
        assert f"| {' | '.join(map(str, columns))} |" in page, row["file"]
    assert page.count("` |\n") == len(rows)
