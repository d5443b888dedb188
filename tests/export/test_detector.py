import importlib.util
import runpy
import sys

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from nl_detectron.config import build_config
from nl_detectron.export import FORMATS, ExportError, export_detector, standalone
from tests.export.acting import make_act, run_acting
from tests.random_model import QUICK_START, SMALL

PLAIN = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY", 0),
]


def make_detector(*overrides):
    words = [*SMALL, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *overrides]
    cfg = build_config(QUICK_START, list(map(str, words)))
    torch.manual_seed(1)
    return make_act(build_model(cfg)).eval()


@pytest.fixture(scope="module")
def image():
    return 255 * torch.rand(3, 128, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_export_passes_wherever_that_of_plain_detectron2_does(format, image, tmp_path):
    """It passes if the file finds the same at several sizes: export_detector verifies that."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
    keypoints = ["MODEL.KEYPOINT_ON", format != "onnx"]
    model, file = make_detector(*keypoints), tmp_path / "model"
    run_acting(model, [{"image": image}])
    model.train()
    try:
        export_detector(model, image, file, format)
    except ExportError as error:
        try:
            export_detector(make_detector(*keypoints, *PLAIN), image, file, format)
        except ExportError as plain_error:
            pytest.skip(f"plain Mask R-CNN fails, too: {plain_error}")
        raise error
    assert list(tmp_path.iterdir()) == [file]
    assert all(module.training for module in model.modules())


class RemembersTheFirstImage(nn.Module):
    def forward(self, x):
        return x + x.mean().item()


class CallsPython(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()


class HoldsPython(nn.Module):
    def forward(self, x):
        return CallsPython.apply(x)


@pytest.mark.parametrize(
    ("culprit", "message"),
    [
        (RemembersTheFirstImage(), "of an image of 96 x 120 pixels: "),
        (HoldsPython(), "PyTorch can't export the model as traced: .*CallsPython"),
    ],
)
def test_file_that_does_not_do_what_the_model_does_is_not_kept(culprit, message, image, tmp_path):
    model = make_detector()
    stem = model.backbone.bottom_up.stem
    stem.conv1 = nn.Sequential(culprit, stem.conv1)
    (tmp_path / "model").write_text("older")
    with pytest.raises(ExportError, match=message):
        export_detector(model, image, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 1


def test_refusals_before_any_work(image, tmp_path, monkeypatch):
    def refused(message, model, format="traced", error=ValueError):
        with pytest.raises(error, match=message):
            export_detector(model, image, tmp_path / "model", format)

    with_keypoints, with_masks = make_detector(), make_detector("MODEL.KEYPOINT_ON", False)
    refused("'traced', 'onnx'; did you mean 'traced'", with_keypoints, "trace")
    refused("a Linear, but only Detectron2's GeneralizedRCNN", nn.Linear(1, 1))
    refused("on meta, but is exported on the CPU", make_detector().to("meta"))
    refused("predicts keypoints, .* choose another format", with_keypoints, "onnx")
    with_masks.roi_heads.box_predictor.test_score_thresh = 1.1
    refused("finds nothing in the image", with_masks)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("pip install onnx onnxruntime", with_masks, "onnx", ModuleNotFoundError)
    assert not list(tmp_path.iterdir())


def test_where_the_file_is_verified_there_is_no_detectron2(tmp_path, monkeypatch):
    class Sum(nn.Module):
        def forward(self, image):
            return {"sum": image.sum()}

    files = [str(tmp_path / name) for name in ("model", "images.npz", "outputs.npz")]
    torch.jit.trace(Sum(), torch.zeros(3, 1, 1), strict=False).save(files[0])
    np.savez(files[1], ones=np.ones((3, 4, 5)))
    packages = ("detectron2", "nl_detectron")
    for package in packages:  # they come back after the test
        monkeypatch.setitem(sys.modules, package, sys.modules[package])
    monkeypatch.setattr(sys, "argv", [standalone.__file__, "traced", *files])
    runpy.run_path(standalone.__file__, run_name="__main__")
    assert dict(np.load(files[2])) == {"ones/sum": 60}
    for package in packages:
        with pytest.raises(ModuleNotFoundError, match=package):
            importlib.import_module(package)
