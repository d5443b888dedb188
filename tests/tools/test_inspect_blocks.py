import json

import cv2
import numpy as np
import pytest

import inspect_blocks
from tests.random_model import save_random_model

BLOCKS = [
    "backbone.bottom_up.res4.nonlocal0",
    "roi_heads.keypoint_head.nonlocal2",
    "roi_heads.keypoint_head.nonlocal4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    save_random_model(folder)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    cv2.imwrite(str(folder / "image.png"), image)
    return folder


def fail(capsys, *words):
    """What is on stderr: one line, or as many as a report on weights that do not fit has."""
    with pytest.raises(SystemExit) as exit_:
        inspect_blocks.main([str(word) for word in words])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert ": error: " in error.splitlines()[0]
    return error


def test_report_on_the_test_dataset(folder, capsys):
    inspect_blocks.main([str(folder / "model_final.pth"), "--num-images", "2"])
    lines = capsys.readouterr().out.splitlines()
    for block in BLOCKS:
        assert any(line.startswith(f"{block}  embedded_gaussian") for line in lines)
        (sentence,) = (line for line in lines if line.startswith(f"{block}: "))
        assert "learnt next to nothing" in sentence


def test_report_on_an_image_and_json(folder, tmp_path):
    words = ["--image", folder / "image.png", "--json", tmp_path / "blocks.json"]
    inspect_blocks.main([str(folder / "model_final.pth"), *map(str, words)])
    reports = json.loads((tmp_path / "blocks.json").read_text())
    assert [report["block"] for report in reports] == BLOCKS
    assert all(0 <= report["attention_entropy"] <= 1 for report in reports)
    assert all(report["relative_change"] == 0 for report in reports)


def test_squares_are_told_of_where_they_have_partners(tmp_path, capsys):
    match = ["DATASETS.TEST", "('long_range_match_val',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    save_random_model(tmp_path, *match, "MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY", "0")
    inspect_blocks.main([str(tmp_path / "model_final.pth"), "--num-images", "2"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{BLOCKS[0]}: A square attends to ")
    assert "% of 4 cases" in last


def test_head_without_detections(folder, capsys):
    image = ["--image", str(folder / "image.png")]
    overrides = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.1"]
    inspect_blocks.main([str(folder / "model_final.pth"), *image, *overrides])
    out = capsys.readouterr().out
    assert out.count("It was given nothing") == 2
    assert out.count("learnt next to nothing") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}/none.pth"], "none.pth, a file that does not exist"),
        (["{alone}/model_final.pth", "--image", "{image}"], "--config-file"),
        (["{weights}", "--image", "{folder}/none.png"], "none.png"),
        (["{weights}", "--image", "{folder}/config.yaml"], "config.yaml"),
        (["{weights}", "DATASETS.TEST", "('never_registered',)"], "'never_registered'"),
        (["{weights}", "DATASETS.TEST", "()"], "--image"),
        (["{weights}", "--num-images", 0], "--num-images: '0' is not"),
        (["{weights}", "MODEL.DEVICE"], "KEY VALUE"),
        (["{weights}", "MODEL.DEVIC", "cpu"], "did you mean 'MODEL.DEVICE'"),
        (
            ["{weights}", "--image", "{image}", "MODEL.NONLOCAL.PAIRWISE", "gaussian"],
            "embedded_gaussian (or dot_product)",
        ),
    ],
)
def test_errors_of_the_user(words, message, folder, tmp_path, capsys):
    (tmp_path / "model_final.pth").symlink_to(folder / "model_final.pth")
    names = {"folder": folder, "weights": folder / "model_final.pth", "alone": tmp_path}
    names["image"] = folder / "image.png"
    assert message in fail(capsys, *(str(word).format(**names) for word in words))


def test_models_without_blocks_are_refused(folder, tmp_path, capsys):
    no_blocks = [
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_no_top_block_backbone"),
        *("MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY", "0"),
    ]
    save_random_model(tmp_path, *no_blocks)
    image = ["--image", folder / "image.png"]
    assert "no non-local blocks" in fail(capsys, tmp_path / "model_final.pth", *image)
