"""A folder as train_net.py leaves it, but of a small model with random weights."""

from pathlib import Path

import torch
from detectron2.modeling import build_model

from nl_detectron.config import build_config
from nl_detectron.weights.checkpoint_io import save_checkpoint

QUICK_START = Path(__file__).resolve().parents[1] / "configs" / "quick_start.yaml"
SMALL = [
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "3"),
]


def save_random_model(folder, *overrides):
    """Write ``config.yaml`` and ``model_final.pth``; returns the config, for that file."""
    cfg = build_config(QUICK_START, [*SMALL, *overrides])
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    cfg.OUTPUT_DIR = str(folder)
    torch.manual_seed(0)
    save_checkpoint(build_model(cfg).state_dict(), cfg.MODEL.WEIGHTS)
    (folder / "config.yaml").write_text(cfg.dump())
    return cfg
