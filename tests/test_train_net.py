"""Errors of the user end train_net.py and tools/lazy_train_net.py in one line; others do not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lazy_train_net
import train_net
from nl_detectron.engine import Trainer, parse_arguments

ROOT = Path(__file__).resolve().parent.parent
QUICK_START = ROOT / "configs" / "quick_start.yaml"
LAZY = ROOT / "configs" / "COCO-InstanceSegmentation" / "mask_rcnn_R_50_FPN_nl_1x.py"
OWN_DATA = ["--train-json", "no.json", "--train-images", ".", "--val-json", "no.json"]
NO_COCO = ["MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "False"]


def run(script, folder, *words):
    """What the script returns, and writes to stderr, started in an empty folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",  # other packages have their own to say
        "DETECTRON2_DATASETS": str(folder / "datasets"),
    }
    command = [sys.executable, script, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, re.sub(r"^W\d{4} .* torch/.*\n", "", done.stderr, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message", "is_logged"),
    [
        (["--config-file", "no.yaml"], "no.yaml does not exist", False),
        (["--config-file", "bad.yaml"], "bad.yaml cannot be read as a config: ", False),
        (["--resum-e"], "unrecognized arguments: --resum-e", False),
        (["SOLVER.BASE_RL", "1"], "did you mean 'SOLVER.BASE_LR'?", False),
        (["SOLVER.BASE_LR", "high"], "for config key: SOLVER.BASE_LR", False),
        (["MODEL.WEIGHTS", "no.pth"], "MODEL.WEIGHTS is no.pth, a file that does not exist", True),
        (["MODEL.WEIGHTS", "bad.yaml"], "bad.yaml", True),
        (["MODEL.NONLOCAL.PAIRWISE", "dot"], "MODEL.NONLOCAL.PAIRWISE is 'dot'", True),
        (["DATASETS.TEST", "('shape_val',)"], "did you mean 'shapes_val'?", True),
        ([*OWN_DATA, "--val-images", "."], "The annotation file no.json does not exist", True),
        ([*NO_COCO, "DATASETS.TRAIN", "('coco_2017_train',)"], "instances_train2017.json", True),
        (["--eval-only", "DATASETS.TEST", "('coco_2017_val',)"], "instances_val2017.json", True),
    ],
)
def test_errors_of_the_user(words, message, is_logged, tmp_path):
    (tmp_path / "bad.yaml").write_text("MODEL: [\nVERSION: 2")
    if "--config-file" not in words:
        words = ["--config-file", str(QUICK_START), *words]
    status, error = run(ROOT / "train_net.py", tmp_path, *words, "OUTPUT_DIR", "out")
    (line,) = error.splitlines()
    assert line.startswith("train_net.py: error: ")
    assert message in line
    assert status == 2
    log = tmp_path / "out" / "log.txt"
    assert log.exists() == is_logged
    assert not is_logged or log.read_text().count("Traceback (most recent call last)") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file", "no.py"], "no.py"),
        (["--config-file", "no.yaml"], "see train_net.py for YAML"),
        (["train.max_iter"], "missing EQUAL"),
        (["train.max_iter.x=1"], "train.max_iter is not a config"),
        (["train.init_checkpoint=no.pth"], "train.init_checkpoint is no.pth, a file that"),
        (["train.init_checkpoint="], "instances_train2017.json"),
        (["train.init_checkpoint=", "--eval-only"], "instances_val2017.json"),
    ],
)
def test_errors_of_the_user_with_a_lazy_config(words, message, tmp_path):
    if "--config-file" not in words:
        words = ["--config-file", str(LAZY), "train.output_dir=out", *words]
    status, error = run(ROOT / "tools" / "lazy_train_net.py", tmp_path, *words)
    (line,) = error.splitlines()
    assert line.startswith("lazy_train_net.py: error: ")
    assert message in line
    assert status == 2


@pytest.mark.slow
def test_traceback_on_request(tmp_path):
    words = ["--config-file", str(QUICK_START), "--traceback", "SOLVER.BASE_RL", "1"]
    status, error = run(ROOT / "train_net.py", tmp_path, *words)
    assert status == 1
    assert "Traceback (most recent call last)" in error
    assert "did you mean 'SOLVER.BASE_LR'" in error.splitlines()[-1]


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError])
def test_errors_while_training_are_the_programs(error, tmp_path, monkeypatch):
    def fail(trainer):
        raise error("inside")

    monkeypatch.setattr(Trainer, "run_step", fail)
    words = ["--config-file", str(QUICK_START), "OUTPUT_DIR", str(tmp_path)]
    with pytest.raises(error, match="inside"):
        train_net.main(parse_arguments(words))


def test_a_bug_while_setting_up_is_the_programs(tmp_path, monkeypatch):
    def fail(*args):
        raise TypeError("inside")

    for script, word in ((train_net, "OUTPUT_DIR={}"), (lazy_train_net, "train.output_dir={}")):
        monkeypatch.setattr(script, "default_setup", fail)
        config = QUICK_START if script is train_net else LAZY
        words = word.format(tmp_path).split("=") if script is train_net else [word.format(tmp_path)]
        with pytest.raises(TypeError, match="inside"):
            script.main(script.parse_arguments(["--config-file", str(config), *words]))
