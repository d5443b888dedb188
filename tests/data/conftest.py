import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances, polygons_to_bitmask

from nl_detectron.data import CompletingCOCOEvaluator


def as_prediction(record):
    """The ground truth of an image in the form of a perfect model's output."""
    size = record["height"], record["width"]
    annotations = [a for a in record["annotations"] if not a["iscrowd"]]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    prediction = Instances(size)
    prediction.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    prediction.pred_classes = torch.tensor([a["category_id"] for a in annotations])
    prediction.scores = torch.ones(len(annotations))
    if annotations and "segmentation" in annotations[0]:
        masks = [
            mask_util.decode(s) if isinstance(s, dict) else polygons_to_bitmask(s, *size)
            for s in (a["segmentation"] for a in annotations)
        ]
        prediction.pred_masks = torch.from_numpy(np.stack(masks)).bool()
    if annotations and "keypoints" in annotations[0]:
        keypoints = torch.tensor([a["keypoints"] for a in annotations], dtype=torch.float32)
        prediction.pred_keypoints = keypoints.reshape(len(annotations), -1, 3)
    return prediction


@pytest.fixture
def evaluate_ground_truth():
    """Score a registered dataset's ground truth against itself: {"bbox": {"AP": ...}, ...}."""

    def evaluate(name, kpt_oks_sigmas=()):
        records = DatasetCatalog.get(name)
        evaluator = CompletingCOCOEvaluator(
            name, distributed=False, use_fast_impl=False, kpt_oks_sigmas=kpt_oks_sigmas
        )
        evaluator.reset()
        evaluator.process(records, [{"instances": as_prediction(r)} for r in records])
        return evaluator.evaluate()

    return evaluate
