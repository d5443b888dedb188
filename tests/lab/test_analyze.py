import json

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg

from lab import analyze
from tests.commands import error_of
from tests.random_model import QUICK_START, SMALL, save_random_model

SMALLEST = ["--config-file", str(QUICK_START), "--size", "64", "64", "--repeats", "1"]


def test_table_and_json_for_random_weights(tmp_path, capsys):
    # Of so many classes none is likely, and such a deviation makes a strong image.
    harder = ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.PIXEL_STD", "[0.01, 0.01, 0.01]"]
    analyze.main([*SMALLEST, "--json", str(tmp_path / "cost.json"), *SMALL, *harder])
    report = json.loads((tmp_path / "cost.json").read_text())
    # The heads still work for as many regions as the config allows.
    assert report["block_inputs"] == {
        "backbone.bottom_up.res4.nonlocal0": [[1, 256, 4, 4]],
        "roi_heads.keypoint_head.nonlocal2": [[3, 64, 14, 14]],
        "roi_heads.keypoint_head.nonlocal4": [[3, 64, 14, 14]],
    }
    with_blocks, without = report["with_blocks"], report["without_blocks"]
    for key in ("parameters", "macs"):
        of_blocks = sum(block[key] for block in report["blocks"].values())
        # Masks are pasted where the objects are, and these are not the same without the blocks.
        assert with_blocks[key] - without[key] == pytest.approx(of_blocks, rel=0.01)
    out = capsys.readouterr().out
    for part in ("GMACs", "with blocks", "ratio", *report["blocks"], "3 x 64 x 14 x 14"):
        assert part in out
    assert f"{with_blocks['parameters'] / 1e6:.4g}" in out


def test_trained_weights_get_what_they_find_in_an_image(tmp_path):
    save_random_model(tmp_path)
    cv2.imwrite(str(tmp_path / "image.png"), np.full((48, 64, 3), 128, np.uint8))
    words = [
        *("--config-file", tmp_path / "config.yaml", "--weights", tmp_path / "model_final.pth"),
        *("--image", tmp_path / "image.png", "--json", tmp_path / "cost.json", "--repeats", 1),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.1),
    ]
    analyze.main([str(word) for word in words])
    report = json.loads((tmp_path / "cost.json").read_text())
    assert report["block_inputs"] == {
        "backbone.bottom_up.res4.nonlocal0": [[1, 256, 4, 6]],
        "roi_heads.keypoint_head.nonlocal2": [[0, 64, 14, 14]],
        "roi_heads.keypoint_head.nonlocal4": [[0, 64, 14, 14]],
    }
    assert report["blocks"]["roi_heads.keypoint_head.nonlocal2"]["macs"] == 0


def test_training(tmp_path, capsys):
    words = ["SOLVER.IMS_PER_BATCH", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    analyze.main([*SMALLEST, "--train", "1", "--json", str(tmp_path / "cost.json"), *SMALL, *words])
    report = json.loads((tmp_path / "cost.json").read_text())
    whole, rest = report["training_with_blocks"], report["training_without_blocks"]
    assert 0 < whole["data_share"] < 1
    assert whole["peak_memory"] > rest["peak_memory"] > 12 * report["without_blocks"]["parameters"]
    out = capsys.readouterr().out
    for part in ("iterations/s", "waiting for data", f"{1 / whole['seconds']:.4g}"):
        assert part in out


def test_size_is_what_evaluation_allows_by_default():
    cfg = get_cfg()
    assert analyze.evaluation_size(cfg) == (800, 1333)
    cfg.INPUT.MIN_SIZE_TEST = 0
    with pytest.raises(ValueError, match="--size"):
        analyze.evaluation_size(cfg)


NO_BLOCKS = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY", 0),
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file", "none.yaml"], "none.yaml does not exist"),
        (["--weights", "none.pth"], "--image"),
        (["--weights", "none.pth", "--image", "image.png"], "none.pth"),
        (["--image", "image.png"], "--weights"),
        (["--size", 0, 64], "--size: '0' is not"),
        (["--train", 0], "--train: '0' is not"),
        (["--repeats", 0], "--repeats: '0' is not"),
        (["MODEL.DEVICE"], "KEY VALUE"),
        (["MODEL.DEVIC", "cpu"], "did you mean 'MODEL.DEVICE'"),
        ([*SMALLEST, *NO_BLOCKS], "no non-local blocks"),
    ],
)
def test_errors_of_the_user(words, message, capsys):
    assert message in error_of(capsys, analyze.main, "--config-file", QUICK_START, *words)
