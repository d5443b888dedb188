"""Errors of the user end train_net.py and tools/lazy_train_net.py in one line; others do not."""

import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

import lazy_train_net
import train_net
from nl_detectron.engine import Trainer, parse_arguments

ROOT = Path(__file__).resolve().parent.parent
TRAIN_NET = ROOT / "train_net.py"
LAZY_TRAIN_NET = ROOT / "tools" / "lazy_train_net.py"
QUICK_START = ROOT / "configs" / "quick_start.yaml"
LAZY = ROOT / "configs" / "COCO-InstanceSegmentation" / "mask_rcnn_R_50_FPN_nl_1x.py"
OWN_DATA = ["--train-json", "no.json", "--train-images", ".", "--val-json", "no.json"]
IN_ONE_LINE = [
    (["--config-file", "no.yaml"], "no.yaml does not exist", False),
    (["SOLVER.BASE_RL", "1"], "did you mean 'SOLVER.BASE_LR'?", False),
    (["MODEL.NONLOCAL.PAIRWISE", "dot"], "MODEL.NONLOCAL.PAIRWISE is 'dot'", True),
    (["MODEL.WEIGHTS", "no.pth"], "MODEL.WEIGHTS is no.pth, a file that does not exist", True),
    ([*OWN_DATA, "--val-images", "."], "The annotation file no.json does not exist", True),
]


def check_line(status, error, script, message):
    # Not what PyTorch says of CUDA when it is asked for the environment.
    (line,) = re.sub(r"^W\d{4} .* torch/.*\n", "", error, flags=re.MULTILINE).splitlines()
    assert line.startswith(f"{script.name}: error: ")
    assert message in line
    assert status == 2


def check_log(folder, is_logged):
    log = folder / "out" / "log.txt"
    assert log.exists() == is_logged
    assert not is_logged or log.read_text().count("Traceback (most recent call last)") == 1


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in an empty folder; returns its exit status and what it writes to stderr."""
    (tmp_path / "bad.yaml").write_text("MODEL: [\nVERSION: 2")
    monkeypatch.chdir(tmp_path)
    for name in ("detectron2", "fvcore", "nl_detectron"):
        # Those of other tests write to a stdout that is closed by now.
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    register_coco_instances("gone", {}, "gone.json", ".")

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(script), run_name="__main__")
        return exit_.value.code, capsys.readouterr().err

    yield run
    DatasetCatalog.remove("gone")
    MetadataCatalog.remove("gone")


def with_config(words, folder):
    if "--config-file" in words:
        return words
    return ["--config-file", str(QUICK_START), "OUTPUT_DIR", str(folder / "out"), *words]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message", "is_logged"), IN_ONE_LINE)
def test_errors_of_the_user(words, message, is_logged, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, TRAIN_NET, *with_config(words, tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    check_line(done.returncode, done.stderr, TRAIN_NET, message)
    check_log(tmp_path, is_logged)


@pytest.mark.parametrize(
    ("words", "message", "is_logged"),
    [
        (["--config-file", "bad.yaml"], "bad.yaml cannot be read as a config: ", False),
        (["--resum-e"], "unrecognized arguments: --resum-e", False),
        (["SOLVER.BASE_LR", "high"], "for config key: SOLVER.BASE_LR", False),
        (["MODEL.WEIGHTS", "bad.yaml"], "bad.yaml", True),
        (["DATASETS.TEST", "('shape_val',)"], "did you mean 'shapes_val'?", True),
        (["DATASETS.TRAIN", "('gone',)"], "gone.json", True),
        (["--eval-only", "DATASETS.TEST", "('gone',)"], "gone.json", True),
    ],
)
def test_more_errors_of_the_user(words, message, is_logged, run, tmp_path):
    check_line(*run(TRAIN_NET, *with_config(words, tmp_path)), TRAIN_NET, message)
    check_log(tmp_path, is_logged)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file", "no.py"], "no.py"),
        (["--config-file", "no.yaml"], "see train_net.py for YAML"),
        (["train.max_iter"], "missing EQUAL"),
        (["train.max_iter.x=1"], "train.max_iter is not a config"),
        (["train.init_checkpoint=no.pth"], "train.init_checkpoint is no.pth, a file that"),
        (["train.init_checkpoint=", "dataloader.train.dataset.names=gone"], "gone.json"),
        (["train.init_checkpoint=", "dataloader.test.dataset.names=gone", "--eval-only"], "gone"),
    ],
)
def test_errors_of_the_user_with_a_lazy_config(words, message, run, tmp_path):
    if "--config-file" not in words:
        words = ["--config-file", str(LAZY), f"train.output_dir={tmp_path}", *words]
    check_line(*run(LAZY_TRAIN_NET, *words), LAZY_TRAIN_NET, message)


def test_traceback_on_request():
    words = ["--config-file", str(QUICK_START), "SOLVER.BASE_RL", "1", "--traceback"]
    with pytest.raises(KeyError, match=r"did you mean 'SOLVER.BASE_LR'"):
        train_net.main(parse_arguments(words))


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
