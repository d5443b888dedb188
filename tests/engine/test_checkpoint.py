import logging
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from nl_detectron import add_nonlocal_config
from nl_detectron.engine import NonLocalCheckpointer


def build(*overrides, blocks=True):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    name = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.NAME = "build_nonlocal_backbone" if blocks else name
    cfg.merge_from_list(list(overrides))
    return build_model(cfg)


def load(model, path, caplog):
    """Load, and return what was logged at each level."""
    with caplog.at_level(logging.INFO, logger="nl_detectron.engine.checkpoint"):
        logging.getLogger("nl_detectron").propagate = True
        NonLocalCheckpointer(model).load(str(path))
    records = [r for r in caplog.records if r.name == "nl_detectron.engine.checkpoint"]
    text = {
        level: "\n".join(r.getMessage() for r in records if r.levelname == level)
        for level in ("INFO", "WARNING")
    }
    caplog.clear()
    return text


@pytest.fixture(scope="module")
def plain():
    return build(blocks=False)


@pytest.fixture
def detector(plain, tmp_path):
    path = tmp_path / "detector.pth"
    torch.save({"model": plain.state_dict()}, path)
    return path


@pytest.fixture
def classifier(plain, tmp_path):
    """What Detectron2's ImageNet weights look like."""
    weights = {
        name: tensor.numpy() for name, tensor in plain.backbone.bottom_up.state_dict().items()
    }
    weights["linear.bias"] = torch.zeros(1000).numpy()
    path = tmp_path / "classifier.pkl"
    content = {"model": weights, "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return path


def test_detector_into_a_model_with_blocks(plain, detector, caplog):
    model = build()
    text = load(model, detector, caplog)
    count = len(plain.state_dict())
    assert f"Loaded {count} tensors from {detector}" in text["INFO"]
    assert "start fresh: backbone.bottom_up.res4.nonlocal0; nothing else" in text["INFO"]
    assert not text["WARNING"]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_classifier_into_a_detector_with_blocks(plain, classifier, caplog):
    model = build()
    text = load(model, classifier, caplog)
    count = len(plain.backbone.bottom_up.state_dict())
    assert f"Loaded {count} tensors" in text["INFO"]
    assert "start fresh: backbone.bottom_up.res4.nonlocal0" in text["INFO"]
    assert "tensors of the detector around it start fresh" in text["INFO"]
    assert "Not used by the model" in text["INFO"]
    assert "linear.bias" in text["INFO"]
    assert not text["WARNING"]
    name = "res4.1.conv1.weight"
    loaded = model.backbone.bottom_up.state_dict()[name]
    assert torch.equal(loaded, plain.backbone.bottom_up.state_dict()[name])


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_warns_of_a_missing_backbone_tensor(kind, request, caplog):
    path = request.getfixturevalue(kind)
    content = torch.load(path) if kind == "detector" else pickle.loads(path.read_bytes())
    name = next(key for key in content["model"] if key.endswith("res4.1.conv1.weight"))
    del content["model"][name]
    if kind == "detector":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    text = load(build(), path, caplog)
    assert "NOT LOADED: 1 tensors" in text["WARNING"]
    assert "res4.1.conv1.weight" in text["WARNING"]
    assert "nothing else is missing" not in text["INFO"]


def test_warns_of_another_shape(detector, caplog):
    text = load(build("MODEL.ROI_HEADS.NUM_CLASSES", 3), detector, caplog)
    assert "cls_score.weight has shape (81, 16) in the checkpoint and (4, 16)" in text["WARNING"]


def test_own_checkpoint_loads_whole(tmp_path, caplog):
    model = build()
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    text = load(build(), path, caplog)
    assert "nothing else is missing" in text["INFO"]
    assert "fresh" not in text["INFO"]
    assert not text["WARNING"]


def test_warns_of_blocks_that_the_model_does_not_have(tmp_path, caplog):
    path = tmp_path / "model.pth"
    torch.save({"model": build().state_dict()}, path)
    text = load(build(blocks=False), path, caplog)
    assert "res4.nonlocal0.theta.weight" in text["WARNING"]
    assert "set MODEL.BACKBONE.NAME and MODEL.NONLOCAL" in text["WARNING"]
