"""Errors of the user end train_net.py and tools/lazy_train_net.py in one line; others do not."""

import logging
import math
import runpy
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

import lazy_train_net
import train_net
from nl_detectron.engine import Trainer, build_config, parse_arguments
from nl_detectron.engine.setup import check_evaluation
from tests.commands import ROOT
from tests.commands import run as run_command

TRAIN_NET = ROOT / "train_net.py"
LAZY_TRAIN_NET = ROOT / "tools" / "lazy_train_net.py"
QUICK_START = ROOT / "configs" / "quick_start.yaml"
LAZY = ROOT / "configs" / "COCO-InstanceSegmentation" / "mask_rcnn_R_50_FPN_nl_1x.py"
OWN_DATA = ["--train-json", "no.json", "--train-images", ".", "--val-json", "no.json"]
BEST, EVAL = ["TEST.BEST_CHECKPOINT_METRIC"], ["TEST.EVAL_PERIOD", "1"]
RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "3"]
IN_ONE_LINE = [
    (["--config-file", "no.yaml"], "no.yaml does not exist", False),
    (["SOLVER.BASE_RL", "1"], "did you mean 'SOLVER.BASE_LR'?", False),
    (["MODEL.NONLOCAL.PAIRWISE", "dot"], "MODEL.NONLOCAL.PAIRWISE is 'dot'", True),
    (["MODEL.WEIGHTS", "no.pth"], "MODEL.WEIGHTS is no.pth, a file that does not exist", True),
    ([*OWN_DATA, "--val-images", "."], "--train-json no.json does not exist", False),
]


def check_line(status, error, script, message):
    (line,) = error.splitlines()
    assert line.startswith(f"{script.name}: error: ")
    assert message in line
    assert status == 2


def check_log(folder, is_logged):
    log = folder / "out" / "log.txt"
    assert log.exists() == is_logged
    text = log.read_text() if is_logged else ""
    assert text.count(" nl_detectron ERROR: ") == is_logged
    assert ("Traceback (most recent call last)" in text) == is_logged


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in an empty folder; returns its exit status and what it writes to stderr."""
    (tmp_path / "bad.yaml").write_text("MODEL: [\nVERSION: 2")
    monkeypatch.chdir(tmp_path)
    weight, variance = "backbone.bottom_up.stem.conv1.weight", "backbone.bottom_up.stem.conv1.norm"
    for name, tensors in {
        "w": {weight: torch.zeros(64, 3, 7, 7)},
        "nan": {weight: torch.full((64, 3, 7, 7), math.nan)},
        "complex": {weight: torch.zeros(64, 3, 7, 7, dtype=torch.complex64)},
        "integers": {weight: torch.zeros(64, 3, 7, 7, dtype=torch.int64)},
        "variance": {f"{variance}.running_var": torch.full((64,), -1.0)},
        "other": {"a.w": torch.zeros(1)},
    }.items():
        torch.save({"model": tensors}, f"{name}.pth")
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
    done = run_command(TRAIN_NET, *with_config(words, tmp_path), cwd=tmp_path)
    check_line(done.returncode, done.stderr, TRAIN_NET, message)
    check_log(tmp_path, is_logged)


@pytest.mark.parametrize(
    ("words", "message", "is_logged"),
    [
        (["--config-file", "bad.yaml"], "bad.yaml cannot be read as a config: ", False),
        (["--resum-e"], "unrecognized arguments: --resum-e", False),
        (["--config-file", "."], "--config-file . is a folder, not a file", False),
        (["--config-file", str(LAZY)], "is Python: use tools/lazy_train_net.py", False),
        (["--num-gpus", "0"], "--num-gpus is 0, but must be ", False),
        (["--num-gpus", "-1"], "--num-gpus is -1, but must be ", False),
        (["--num-machines", "0"], "--num-machines is 0, but must be at least 1", False),
        (["--machine-rank", "1"], "--machine-rank is 1, but must be from 0 to 0", False),
        (
            ["SOLVER.BASE_LR", "high"],
            "SOLVER.BASE_LR is 'high', of type str, but must be of type float",
            False,
        ),
        (["OUTPUT_DIR", "bad.yaml"], "OUTPUT_DIR is bad.yaml, which is no folder", False),
        (["OUTPUT_DIR", "bad.yaml/x"], "OUTPUT_DIR is bad.yaml/x, which is no folder", False),
        (["OUTPUT_DIR", "''"], "OUTPUT_DIR is empty, but must be a folder", False),
        (["MODEL.FPN.IN_FEATURES", "['res33']"], "MODEL.FPN.IN_FEATURES has 'res33'", True),
        (["MODEL.FPN.IN_FEATURES", "['res33']"], "did you mean 'res3'?", True),
        (["MODEL.RPN.IN_FEATURES", "['p7']"], "MODEL.RPN.IN_FEATURES", True),
        (["MODEL.RESNETS.OUT_FEATURES", "['res33']"], "The model cannot be built: ", True),
        (
            ["MODEL.BACKBONE.NAME", "build_nonlocal"],
            "did you mean 'build_nonlocal_backbone'?",
            True,
        ),
        (["MODEL.ROI_HEADS.NAME", "StandardROIHead"], "did you mean 'StandardROIHeads'?", True),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "5"], "shapes_train has 3 classes", True),
        (["DATASETS.TRAIN", "('coco_2017_train',)"], "DETECTRON2_DATASETS", True),
        (["TEST.AUG.ENABLED", "True"], "MODEL.KEYPOINT_ON (with TEST.AUG.ENABLED) is True", True),
        (
            ["TEST.AUG.ENABLED", "True", *RETINANET],
            "(with TEST.AUG.ENABLED) is 'RetinaNet', but must be one of 'GeneralizedRCNN'",
            True,
        ),
        ([*BEST, "bbox/AP"], "TEST.EVAL_PERIOD is 0", True),
        ([*EVAL, *BEST, "box/AP"], "is 'box/AP', but must be one of 'bbox/AP', 'bbox/AP50'", True),
        ([*EVAL, *BEST, "keypoints/APs"], "TEST.BEST_CHECKPOINT_METRIC is 'keypoints/AP", True),
        ([*EVAL, *BEST, "bbox/AP-cat"], "TEST.BEST_CHECKPOINT_METRIC is 'bbox/AP-cat'", True),
        (
            [*EVAL, *BEST, "segm/AP", "MODEL.MASK_ON", "False"],
            "TEST.BEST_CHECKPOINT_METRIC is 'segm/AP'",
            True,
        ),
        (
            [*EVAL, *BEST, "bbox/AP", "DATASETS.TEST", "('shapes_val','shapes_train')"],
            "must be one of 'shapes_val/bbox/AP'",
            True,
        ),
        (["MODEL.WEIGHTS", "."], "MODEL.WEIGHTS is ., a folder, not a file", True),
        (["MODEL.WEIGHTS", "nan.pth"], "stem.conv1.weight has values that are not finite", True),
        (["MODEL.WEIGHTS", "complex.pth"], "stem.conv1.weight is complex", True),
        (["MODEL.WEIGHTS", "integers.pth"], "stem.conv1.weight has integers", True),
        (["MODEL.WEIGHTS", "variance.pth"], "running_var has negative variances", True),
        (["MODEL.WEIGHTS", "other.pth"], "None of the 1 tensors in other.pth, such as a.w", True),
        (["--eval-only"], "MODEL.WEIGHTS is empty, but --eval-only", True),
        (
            ["--eval-only", "--resume"],
            "MODEL.WEIGHTS is empty, but --eval-only",
            True,
        ),
        (["MODEL.WEIGHTS", "bad.yaml"], "bad.yaml", True),
        (
            ["MODEL.WEIGHTS", "http://localhost:9/model.pth", "DATASETS.TRAIN", "('gone',)"],
            "MODEL.WEIGHTS is http://localhost:9/model.pth, which cannot be downloaded (",
            True,
        ),
        (["--project", "no_such"], "--project: no_such cannot be imported: No module", False),
        (["--project", "no.py"], "no.py cannot be imported: the file does not exist", False),
        (["DATASETS.TEST", "('shape_val',)"], "did you mean 'shapes_val'?", True),
        (["DATASETS.TRAIN", "('gone',)"], "gone.json", True),
        (
            ["--eval-only", "DATASETS.TEST", "('gone',)", "MODEL.WEIGHTS", "w.pth"],
            "gone.json",
            True,
        ),
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


@pytest.mark.parametrize("metric", ["bbox/AP", "segm/APs", "keypoints/APl", "bbox/AP-square"])
def test_metrics_of_the_best_checkpoint(metric):
    check_evaluation(build_config(QUICK_START, [*EVAL, *BEST, metric]))


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

    lazy_words = [f"train.output_dir={tmp_path}", "train.init_checkpoint="]
    for script, config, words in (
        (train_net, QUICK_START, ["OUTPUT_DIR", str(tmp_path)]),
        (lazy_train_net, LAZY, lazy_words),
    ):
        monkeypatch.setattr(script, "default_setup", fail)
        with pytest.raises(TypeError, match="inside"):
            script.main(script.parse_arguments(["--config-file", str(config), *words]))
