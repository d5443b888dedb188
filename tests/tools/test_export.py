import textwrap

import cv2
import numpy as np
import pytest
import torch

import export
from tests.random_model import save_random_model


@pytest.fixture
def folder(tmp_path):
    save_random_model(tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    return tmp_path


def words(folder, output="model.ts", **replaced):
    options = {
        "--config-file": folder / "config.yaml",
        "--weights": folder / "model_final.pth",
        "--image": folder / "image.png",
        "--output": folder / "out" / output,
        **{f"--{name.replace('_', '-')}": value for name, value in replaced.items()},
    }
    return [str(word) for pair in options.items() for word in pair]


@pytest.mark.slow
def test_the_file_is_used_as_printed(folder, capsys):
    assert export.main(words(folder)) == 0
    out = capsys.readouterr().out
    assert "float32, its channels BGR from 0 to 255, resized as in training: here to 64 x 85" in out
    names = {"image": 255 * torch.rand(3, 64, 85)}
    exec(textwrap.dedent(out.split("\n\n")[1]), names)
    assert {name: x.shape for name, x in names["found"].items()} == {
        "pred_boxes": (3, 4),
        "scores": (3,),
        "pred_classes": (3,),
        "pred_masks": (3, 1, 28, 28),
        "pred_keypoints": (3, 2, 3),
        "pred_keypoint_heatmaps": (3, 2, 56, 56),
    }


def test_status_1_and_no_file_if_it_does_not_find_the_same(folder, capsys, monkeypatch):
    def fail(*_):
        raise export.ExportError("scores: differs by up to 1 from the model's")

    monkeypatch.setattr(export, "export_detector", fail)
    assert export.main(words(folder)) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.endswith("model.ts is not written: scores: differs by up to 1 from the model's")


def test_format_follows_the_suffix_unless_it_is_named(folder, monkeypatch):
    formats = []
    monkeypatch.setattr(export, "export_detector", lambda *words: formats.append(words[-1]))
    for more in ([], ["--format", "traced"]):
        for output in ("model.ts", "model.onnx"):
            assert export.main([*words(folder, output), *more]) == 0
    assert formats == ["traced", "onnx", "traced", "traced"]


def test_datasets_that_are_not_registered_here(folder, monkeypatch):
    """As in the config of a keypoint model that train_net.py trained on --train-json."""
    images = []
    monkeypatch.setattr(export, "export_detector", lambda model, image, *_: images.append(image))
    data = ["DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)"]
    assert export.main([*words(folder), *data]) == 0
    assert images[0].shape == (3, 64, 85)


@pytest.mark.parametrize(
    ("replaced", "more", "message"),
    [
        ({"config_file": "none.yaml"}, [], "none.yaml does not exist"),
        ({"weights": "none.pth"}, [], "none.pth, a file that does not exist"),
        ({"image": "none.png"}, [], "none.png"),
        ({}, ["MODEL.DEVICE"], "pairs of KEY VALUE, but got MODEL.DEVICE"),
        ({}, ["MODEL.DEVIC", "cpu"], "did you mean 'MODEL.DEVICE'"),
        ({}, ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.1"], "finds nothing"),
        ({"format": "onnx"}, [], "predicts keypoints"),
        ({"format": "scripted"}, [], "PyTorch deprecates scripting: use traced, or onnx"),
    ],
)
def test_errors_of_the_user(folder, capsys, replaced, more, message):
    with pytest.raises(SystemExit) as exit_:
        export.main([*words(folder, **replaced), *more])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "out" / "model.ts").exists()
