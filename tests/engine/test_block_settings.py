"""The settings that are told from a model's tensors are those it was built with."""

import pytest
import torch
from detectron2.modeling import build_model

from nl_detectron import model_zoo
from nl_detectron.engine.block_settings import block_of, block_settings

STAGES = ["res2", "res3", "res4", "res5"]
ABLATION = "ablations/mask_rcnn_R_50_FPN_nl_"


def settings_of(name, *overrides):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "meta"
    cfg.merge_from_list(list(overrides))
    with torch.device("meta"):
        model = build_model(cfg)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    settings = block_settings(shapes, STAGES)
    return {key.removeprefix("MODEL."): value for key, value in settings.items()}


@pytest.mark.parametrize(
    ("name", "after_blocks"),
    [
        ("5_blocks", [[], [1, 3], [1, 3, 5], []]),
        ("res2", [[1], [], [], []]),
        ("concatenation", [[], [], [4], []]),
        ("gaussian", [[], [], [4], []]),
        ("disentangled", [[], [], [4], []]),
    ],
)
def test_blocks_in_the_backbone(name, after_blocks):
    pairwise = "embedded_gaussian (or dot_product)"
    if name in ("concatenation", "gaussian", "disentangled"):
        pairwise = name
    config = f"{ABLATION}{name}_1x"
    if name == "disentangled":
        config = "successors/mask_rcnn_R_50_FPN_dnl_1x"
    assert settings_of(config) == {
        "BACKBONE.NAME": "build_nonlocal_backbone",
        "NONLOCAL.AFTER_BLOCKS_PER_STAGE": f'"{after_blocks}"',
        "NONLOCAL.PAIRWISE": pairwise,
        "NONLOCAL.NORM": "BN (or SyncBN, FrozenBN)",
        "NONLOCAL.REDUCTION": "4" if name == "disentangled" else "2",
    }


def test_blocks_in_the_keypoint_head():
    overrides = (
        *("MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY", 4, "MODEL.NONLOCAL.REDUCTION", 3),
        *("MODEL.NONLOCAL.NORM", ""),
    )
    assert settings_of("COCO-Keypoints/keypoint_rcnn_R_101_FPN_nl_head_1x", *overrides) == {
        "ROI_KEYPOINT_HEAD.NAME": "NonLocalKeypointHead",
        "NONLOCAL.KEYPOINT_HEAD_EVERY": "4",
        "NONLOCAL.PAIRWISE": "embedded_gaussian (or dot_product)",
        "NONLOCAL.NORM": '""',
        "NONLOCAL.REDUCTION": "3",
    }


def test_global_context_blocks():
    overrides = (
        *("MODEL.NONLOCAL.BLOCK", "GlobalContextBlock", "MODEL.NONLOCAL.REDUCTION", 16),
        *("MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE", [[], [0], [-1], []]),
    )
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x"
    assert settings_of(name, *overrides) == {
        "BACKBONE.NAME": "build_nonlocal_backbone",
        "NONLOCAL.AFTER_BLOCKS_PER_STAGE": '"[[], [0], [5], []]"',
        "NONLOCAL.BLOCK": "GlobalContextBlock",
        "NONLOCAL.REDUCTION": "16",
    }


def test_no_blocks():
    assert settings_of("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x") == {}


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        ("backbone.bottom_up.res4.nonlocal4.g.weight", "backbone.bottom_up.res4.nonlocal4"),
        ("nonlocal12.norm.bias", "nonlocal12"),
        ("res4.4.conv1.weight", None),
        ("nonlocal_conv4_1_g_w", None),
        ("nonlocal.g.weight", None),
    ],
)
def test_block_of(tensor, block):
    assert block_of(tensor) == block
