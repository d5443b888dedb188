import numpy as np
import pytest
import torch

from nl_detectron.config import build_config
from nl_detectron.data import register_built_in
from nl_detectron.engine.drawing import draw_predictions
from nl_detectron.engine.predictor import Predictor, dataset_metadata
from nl_detectron.weights.checkpoint_io import CheckpointError
from tests.random_model import QUICK_START, save_random_model


def test_predictor_predicts_what_the_model_does(tmp_path):
    gray = np.full((60, 80, 3), 128, np.uint8)
    cfg = save_random_model(tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    predictor = Predictor(cfg)
    found = predictor(gray)["instances"]
    assert len(found) == 3
    drawn = draw_predictions(gray, found, predictor.metadata, 2)
    assert (predictor.draw(gray, 2) == drawn).all()
    weights = torch.load(cfg.MODEL.WEIGHTS)["model"]
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_predictor_refuses_weights_that_do_not_fit(tmp_path):
    cfg = save_random_model(tmp_path)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(CheckpointError, match="cls_score"):
        Predictor(cfg)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_predictor_runs_without_cuda(tmp_path):
    cfg = save_random_model(tmp_path)
    cfg.MODEL.DEVICE = "cuda"
    cfg.freeze()
    assert Predictor(cfg).model.device.type == "cpu"


@pytest.mark.parametrize(
    ("overrides", "is_known"),
    [
        ([], True),
        (["DATASETS.TEST", "()"], False),
        (["DATASETS.TEST", "('not_registered',)"], False),
        (["DATASETS.TEST", "('coco_2017_val',)"], False),
        (["DATASETS.TEST", "('coco_2017_val',)", "MODEL.ROI_HEADS.NUM_CLASSES", "80"], True),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], False),
        (["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "3"], True),
        (["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "17"], False),
        (["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "17", "MODEL.KEYPOINT_ON", "False"], True),
    ],
)
def test_names_are_known_if_they_fit_the_model(overrides, is_known):
    cfg = build_config(QUICK_START, overrides)
    register_built_in(cfg.DATASETS.TEST)
    assert bool(dataset_metadata(cfg).get("thing_classes")) == is_known
