"""A few iterations and an evaluation on real COCO images, where a sample of them is at hand."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

import train_net
from nl_detectron.engine import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
COCO_SAMPLE = ROOT.parent / "shared" / "data" / "coco"
CONFIGS = {
    "box": "COCO-Detection/faster_rcnn_R_50_FPN_nl_1x.yaml",
    "mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.yaml",
    "keypoint": "COCO-Keypoints/keypoint_rcnn_R_101_FPN_nl_head_backbone_1x.yaml",
}
TASKS = {"box": {"bbox"}, "mask": {"bbox", "segm"}, "keypoint": {"bbox", "keypoints"}}
ITERATIONS = 2

pytestmark = pytest.mark.skipif(not COCO_SAMPLE.is_dir(), reason="there is no sample of COCO")


def two_images(split, kind, folder):
    """The first two images with a keypoint (with an object), as a COCO file of their own."""
    name = "person_keypoints" if kind == "keypoint" else "instances"
    coco = json.loads((COCO_SAMPLE / "annotations" / f"{name}_{split}2017.json").read_text())
    wanted = [a for a in coco["annotations"] if not a["iscrowd"] and a.get("num_keypoints", 1)]
    ids = list(itertools.islice(dict.fromkeys(a["image_id"] for a in wanted), 2))
    coco["images"] = [image for image in coco["images"] if image["id"] in ids]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
    path = folder / f"{split}.json"
    path.write_text(json.dumps(coco))
    return str(path), str(COCO_SAMPLE / f"{split}2017")


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_trains_and_evaluates(kind, tmp_path):
    train_json, train_images = two_images("train", kind, tmp_path)
    val_json, val_images = two_images("val", kind, tmp_path)
    args = parse_arguments(
        [
            *("--config-file", str(ROOT / "configs" / CONFIGS[kind])),
            *("--train-json", train_json, "--train-images", train_images),
            *("--val-json", val_json, "--val-images", val_images),
            *("OUTPUT_DIR", str(tmp_path / "output"), "MODEL.WEIGHTS", ""),
            # Untrained, the backbone has nothing to be frozen, and needs a norm that works at once
            # for the model to predict anything.
            *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.NORM", "GN"),
            *("MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
            *("INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MAX_SIZE_TRAIN", "213"),
            *("INPUT.MIN_SIZE_TEST", "128", "INPUT.MAX_SIZE_TEST", "213"),
            *("SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.IMS_PER_BATCH", "2"),
            *("SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
            *("TEST.DETECTIONS_PER_IMAGE", "10"),
        ]
    )
    train_net.main(args)
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = {k: v for r in records for k, v in r.items() if "loss" in k}
    assert {"total_loss", "loss_cls", "loss_rpn_loc"} <= losses.keys()
    assert np.isfinite(list(losses.values())).all()
    tasks = {key.split("/")[0] for record in records for key in record if key.endswith("/AP")}
    assert tasks == TASKS[kind]
    detections = tmp_path / "output" / "inference" / "coco_instances_results.json"
    assert json.loads(detections.read_text())
    COCO(val_json).loadRes(str(detections))
