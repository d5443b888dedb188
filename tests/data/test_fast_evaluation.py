"""TEST.FAST_EVAL: the same numbers as the official implementation."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import coco_evaluation

import nl_detectron.data.toy  # noqa: F401 (registers shapes_val)
from nl_detectron.config import build_config
from nl_detectron.data import CompletingCOCOEvaluator, FastCOCOEvaluator
from nl_detectron.engine.setup import check_evaluation
from nl_detectron.engine.trainer import Trainer
from tests.data.conftest import as_prediction


def guesses(record, generator):
    """Each object up to three times, somewhat beside itself, with scores that are often equal."""
    truth = as_prediction(record)
    count = len(truth)
    found = truth[torch.arange(count).repeat(3)[torch.rand(3 * count, generator=generator) < 0.7]]
    noise = torch.randn(len(found), 4, generator=generator)
    found.pred_boxes.tensor += 3 * noise
    found.pred_keypoints[..., :2] += 2 * noise[:, None, :2]
    found.pred_masks = torch.stack(
        [mask.roll(int(shift), 0) for mask, shift in zip(found.pred_masks, 2 * noise[:, 0])]
    )
    found.scores = torch.rand(len(found), generator=generator).mul(10).round() / 10
    wrong = torch.rand(len(found), generator=generator) < 0.1
    found.pred_classes = torch.where(wrong, 0, found.pred_classes)
    return found


def evaluate(kind, predictions, **options):
    evaluator = kind("shapes_val", distributed=False, use_fast_impl=False, **options)
    evaluator.reset()
    for record, prediction in copy.deepcopy(predictions):  # the evaluator shifts its keypoints
        evaluator.process([record], [{"instances": prediction}])
    return evaluator.evaluate([record["image_id"] for record, _ in predictions])


QUICK_START = Path(__file__).parents[2] / "configs" / "quick_start.yaml"


@pytest.fixture(scope="module")
def predictions():
    generator = torch.Generator().manual_seed(0)
    records = DatasetCatalog.get("shapes_val")[:12]
    return [(record, guesses(record, generator)) for record in records]


@pytest.mark.parametrize("max_dets", [None, 5])
def test_the_numbers_are_the_same(predictions, max_dets):
    options = {"kpt_oks_sigmas": [0.05, 0.1], "max_dets_per_image": max_dets}
    expected, actual = (
        evaluate(kind, predictions, **options)
        for kind in (CompletingCOCOEvaluator, FastCOCOEvaluator)
    )
    assert actual.keys() == expected.keys() == {"bbox", "segm", "keypoints"}
    for task, values in expected.items():
        assert actual[task] == pytest.approx(values, rel=1e-13, abs=0, nan_ok=True), task
        assert 5 < values["AP"] < 95, "neither all right nor all wrong"


def test_the_config_chooses(tmp_path):
    cfg = build_config(QUICK_START, ["OUTPUT_DIR", str(tmp_path)])
    assert type(Trainer.build_evaluator(cfg, "shapes_val")) is CompletingCOCOEvaluator
    cfg.TEST.FAST_EVAL = True
    assert type(Trainer.build_evaluator(cfg, "shapes_val")) is FastCOCOEvaluator
    assert coco_evaluation.COCOeval.__module__ == "pycocotools.cocoeval"


def test_it_has_to_be_installed(monkeypatch):
    cfg = build_config(QUICK_START, ["TEST.FAST_EVAL", "True"])
    check_evaluation(cfg)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ValueError, match=r"TEST.FAST_EVAL is True, .* pip install faster-coco-"):
        check_evaluation(cfg)
