"""The command line of a small training, which takes a tenth of a second a step."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quick_start.yaml")
OVERRIDES = [
    *("MODEL.DEVICE", "cpu", "SEED", "7", "SOLVER.WARMUP_ITERS", "5", "SOLVER.STEPS", "(12,)"),
    *("DATASETS.TRAIN", "('few_train',)", "DATASETS.TEST", "('few_val',)"),
    *("TEST.DETECTIONS_PER_IMAGE", "3", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
    *("INPUT.MIN_SIZE_TRAIN", "(32,48)", "INPUT.MIN_SIZE_TEST", "32", "INPUT.MAX_SIZE_TRAIN", "64"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[16,16]", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.NONLOCAL.BACKBONE", "build_thin_backbone", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"),
]
SMALL = [
    "--project",
    str(ROOT / "tests" / "engine" / "small_runs.py"),
    "--config-file",
    CONFIG,
    *OVERRIDES,
]
