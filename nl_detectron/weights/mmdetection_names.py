"""What mmdetection 2.x and 3.x call the tensors of a detector, and the keys of its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nl_detectron.weights.resnets import DEPTHS

_FROM_1 = {str(i): str(i + 1) for i in range(16)}  # they count from 0, Detectron2 from 1

_LEAF = r"(?P<leaf>weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCK, _OUR_BLOCK = r"backbone\.layer(?P<stage>[1-4])\.(?P<block>\d+)", "res{stage}.{block}"
_CONTEXT = r"(?P<part>conv_mask|channel_add_conv\.[013])"
_NONLOCAL = r"(?P<part>theta|phi|g|conv_out)"
_FPN, _HEAD, _MASK = r"neck\.(?:0\.)?", r"roi_head\.bbox_head", r"roi_head\.mask_head"

_PATTERNS = {
    r"backbone\.conv1": "backbone.bottom_up.stem.conv1",
    r"backbone\.[bg]n1": "backbone.bottom_up.stem.conv1.norm",
    rf"{_BLOCK}\.conv(?P<i>[123])": f"backbone.bottom_up.{_OUR_BLOCK}.conv{{i}}",
    rf"{_BLOCK}\.[bg]n(?P<i>[123])": f"backbone.bottom_up.{_OUR_BLOCK}.conv{{i}}.norm",
    rf"{_BLOCK}\.downsample\.0": f"backbone.bottom_up.{_OUR_BLOCK}.shortcut",
    rf"{_BLOCK}\.downsample\.1": f"backbone.bottom_up.{_OUR_BLOCK}.shortcut.norm",
    rf"{_BLOCK}\.(?P<place>(?:sum\.)?context_block)\.{_CONTEXT}": (
        f"backbone.bottom_up.{_OUR_BLOCK}.{{place}}.nonlocal.{{part}}"
    ),
    rf"{_BLOCK}\.(?P<place>nonlocal_block)\.{_NONLOCAL}\.conv": (
        f"backbone.bottom_up.{_OUR_BLOCK}.{{place}}.nonlocal.{{part}}"
    ),
    rf"{_FPN}lateral_convs\.(?P<level>[0-3])\.conv": "backbone.fpn_lateral{level}",
    rf"{_FPN}lateral_convs\.(?P<level>[0-3])\.[bg]n": "backbone.fpn_lateral{level}.norm",
    rf"{_FPN}fpn_convs\.(?P<level>[0-3])\.conv": "backbone.fpn_output{level}",
    rf"{_FPN}fpn_convs\.(?P<level>[0-3])\.[bg]n": "backbone.fpn_output{level}.norm",
    rf"neck\.1\.refine\.{_NONLOCAL}\.conv": "backbone.nonlocal.refine.{part}",
    r"neck\.1\.refine\.conv": "backbone.nonlocal.refine",
    r"rpn_head\.(?P<part>rpn_conv|rpn_cls|rpn_reg)": "proposal_generator.rpn_head.{part}",
    rf"{_HEAD}\.shared_convs\.(?P<number>\d+)\.conv": "roi_heads.box_head.conv{number}",
    rf"{_HEAD}\.shared_convs\.(?P<number>\d+)\.[bg]n": "roi_heads.box_head.conv{number}.norm",
    rf"{_HEAD}\.shared_fcs\.(?P<number>\d+)": "roi_heads.box_head.fc{number}",
    rf"{_HEAD}\.(?P<part>fc_cls|fc_reg)": "roi_heads.box_predictor.{part}",
    rf"{_MASK}\.convs\.(?P<number>\d+)\.conv": "roi_heads.mask_head.mask_fcn{number}",
    rf"{_MASK}\.convs\.(?P<number>\d+)\.[bg]n": "roi_heads.mask_head.mask_fcn{number}.norm",
    rf"{_MASK}\.(?P<part>upsample|conv_logits)": "roi_heads.mask_head.{part}",
}
NAMES = [(rf"{theirs}\.{_LEAF}", f"{ours}.{{leaf}}") for theirs, ours in _PATTERNS.items()]
"""Patterns of their names, and ours with the same groups."""

WORDS = {
    "stage": _FROM_1,
    "number": _FROM_1,
    "level": {str(i): str(i + 2) for i in range(4)},
    "place": {"context_block": "conv3", "sum.context_block": "sum", "nonlocal_block": "sum"},
    "part": {
        "conv_mask": "context",
        "channel_add_conv.0": "reduce",
        "channel_add_conv.1": "norm",
        "channel_add_conv.3": "out",
        "conv_out": "out",
        "rpn_conv": "conv",
        "rpn_cls": "objectness_logits",
        "rpn_reg": "anchor_deltas",
        "fc_cls": "cls_score",
        "fc_reg": "bbox_pred",
        "upsample": "deconv",
        "conv_logits": "predictor",
    },
}
"""What a group of a pattern has, to ours; what is missing stays."""


@dataclass(frozen=True)
class To:
    """The value of a key of theirs is that of this key of ours; ``default`` is theirs."""

    key: str
    default: Any = None


@dataclass(frozen=True)
class Norm:
    """A ``norm_cfg`` of theirs is this key of ours."""

    key: str


ANY = object()
"""A key that says nothing of what the detector computes once it is trained."""

# Their keys: where the value goes, the values that can be converted (their default first), ANY, or
# the keys of the dict(...) that the value is.
_BOX_CODER = {
    "type": ("DeltaXYWHBBoxCoder",),
    "target_means": ([0.0] * 4,),
    "clip_border": (True,),
    "add_ctr_clamp": (False,),
    "ctr_clamp": ANY,
}


def _pooler(head: str) -> dict[str, Any]:
    return {
        "type": ("SingleRoIExtractor",),
        "featmap_strides": ([4, 8, 16, 32],),
        "finest_scale": (56,),
        "out_channels": ANY,
        "roi_layer": {
            "type": ("RoIAlign",),
            "pool_mode": ("avg",),
            "aligned": (True, False),
            "output_size": To(f"MODEL.{head}.POOLER_RESOLUTION"),
            "sampling_ratio": To(f"MODEL.{head}.POOLER_SAMPLING_RATIO", 0),
        },
    }


def _nms(key: str) -> dict[str, Any]:
    return {"type": ("nms",), "iou_threshold": To(key)}


BLOCKS_OF_DEPTH = {depth: blocks for (bottlenecks, blocks), depth in DEPTHS.items() if bottlenecks}
RESNET = {
    "type": ("ResNet", "ResNeXt"),
    "depth": To("MODEL.RESNETS.DEPTH"),
    "groups": To("MODEL.RESNETS.NUM_GROUPS", 1),
    **dict.fromkeys(("base_width", "base_channels", "stem_channels"), ANY),
    "in_channels": (3,),
    "num_stages": (4,),
    "strides": ([1, 2, 2, 2],),
    "dilations": ([1, 1, 1, 1],),
    "out_indices": ([0, 1, 2, 3],),
    "style": ("pytorch", "caffe"),
    "deep_stem": (False,),
    "avg_down": (False,),
    "conv_cfg": (None,),
    "dcn": (None,),
    "norm_cfg": Norm("MODEL.RESNETS.NORM"),
    **dict.fromkeys(("frozen_stages", "norm_eval", "plugins", "stage_with_dcn"), ANY),
    **dict.fromkeys(("init_cfg", "pretrained", "with_cp", "zero_init_residual"), ANY),
    "non_inplace": ANY,
}
NORM = {
    "type": ("BN", "SyncBN", "GN", "ABN", "SyncABN"),
    "activation": ("identity",),
    "requires_grad": ANY,
    "eps": (1e-5,),
    "num_groups": (32,),
    "momentum": ANY,
}
PLUGIN = {"cfg": ANY, "position": ("after_conv3", "after_sum"), "stages": ANY}
CONTEXT_BLOCK = {
    "type": ("ContextBlock",),
    "ratio": ANY,
    "pooling_type": ("att",),
    "fusion_types": (["channel_add"],),
    "simple": (False,),
}
NONLOCAL_BLOCK = {
    "type": ("NonLocal2D",),
    "mode": ("embedded_gaussian",),
    "reduction": To("MODEL.NONLOCAL.REDUCTION", 2),
    "use_scale": To("MODEL.NONLOCAL.SCALE", True),
    "fixbug": (True,),  # without it, the logits are multiplied by d^1/2, not by d^-1/2
    "temp": (1.0,),
    **dict.fromkeys(("learn_t", "downsample"), (False,)),
    **dict.fromkeys(("conv_cfg", "norm_cfg", "whiten_type", "gcb"), (None,)),
}
FPN = {
    "type": ("FPN",),
    "out_channels": To("MODEL.FPN.OUT_CHANNELS"),
    "norm_cfg": Norm("MODEL.FPN.NORM"),
    "num_outs": (5,),
    "start_level": (0,),
    "end_level": (-1, 3),
    "add_extra_convs": (False,),
    "no_norm_on_lateral": (False,),
    "conv_cfg": (None,),
    "act_cfg": (None,),
    "upsample_cfg": ({"mode": "nearest"},),
    **dict.fromkeys(("in_channels", "init_cfg"), ANY),
    **dict.fromkeys(("relu_before_extra_convs", "extra_convs_on_inputs", "non_inplace"), ANY),
}
BFP = {
    "type": ("BFP",),
    "num_levels": (5,),
    "refine_level": (2,),
    "refine_type": (None, "conv", "non_local"),
    "conv_cfg": (None,),
    "norm_cfg": (None,),
    **dict.fromkeys(("in_channels", "init_cfg"), ANY),
}
PLAIN_BLOCK = {
    "BLOCK": "NonLocalBlock",
    "PAIRWISE": "embedded_gaussian",
    "REDUCTION": 1,
    "SCALE": False,
    "SUBSAMPLE": "none",
    "NORM": "",
}
"""Their non-local block, in the keys of MODEL.NONLOCAL, as the balanced pyramid has it."""
BFP_BLOCKS = {None: {"BLOCK": "IdentityBlock"}, "conv": {"BLOCK": "ConvReLUBlock"}}
"""What else a balanced pyramid is refined by, in the same keys."""
RPN_HEAD = {
    "type": ("RPNHead",),
    "num_convs": (1,),
    "anchor_generator": {
        "type": ("AnchorGenerator",),
        "scales": ANY,
        "ratios": ANY,
        "strides": ([4, 8, 16, 32, 64],),
        "center_offset": To("MODEL.ANCHOR_GENERATOR.OFFSET", 0.0),
    },
    "bbox_coder": {**_BOX_CODER, "target_stds": ([1.0] * 4,)},
    **dict.fromkeys(("in_channels", "feat_channels", "init_cfg", "loss_cls", "loss_bbox"), ANY),
}
BOX_HEAD = {
    "type": ("ConvFCBBoxHead", "Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead"),
    "num_shared_convs": To("MODEL.ROI_BOX_HEAD.NUM_CONV", 0),
    "num_shared_fcs": To("MODEL.ROI_BOX_HEAD.NUM_FC", 0),
    **dict.fromkeys(("num_cls_convs", "num_cls_fcs", "num_reg_convs", "num_reg_fcs"), (0,)),
    "conv_out_channels": To("MODEL.ROI_BOX_HEAD.CONV_DIM", 256),
    "fc_out_channels": To("MODEL.ROI_BOX_HEAD.FC_DIM", 1024),
    "norm_cfg": Norm("MODEL.ROI_BOX_HEAD.NORM"),
    "num_classes": To("MODEL.ROI_HEADS.NUM_CLASSES", 80),
    "reg_class_agnostic": To("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False),
    "with_avg_pool": (False,),
    "conv_cfg": (None,),
    "reg_predictor_cfg": ({"type": "Linear"},),
    "cls_predictor_cfg": ({"type": "Linear"},),
    "bbox_coder": {**_BOX_CODER, "target_stds": ([0.1, 0.1, 0.2, 0.2],)},
    **dict.fromkeys(("in_channels", "roi_feat_size", "init_cfg"), ANY),
    **dict.fromkeys(("loss_cls", "loss_bbox", "reg_decoded_bbox"), ANY),
}
MASK_HEAD = {
    "type": ("FCNMaskHead",),
    "num_convs": To("MODEL.ROI_MASK_HEAD.NUM_CONV", 4),
    "conv_out_channels": To("MODEL.ROI_MASK_HEAD.CONV_DIM", 256),
    "norm_cfg": Norm("MODEL.ROI_MASK_HEAD.NORM"),
    "class_agnostic": To("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", False),
    "conv_kernel_size": (3,),
    "conv_cfg": (None,),
    "upsample_cfg": ({"type": "deconv", "scale_factor": 2},),
    "predictor_cfg": ({"type": "Conv"},),
    **dict.fromkeys(("num_classes", "in_channels", "roi_feat_size", "init_cfg", "loss_mask"), ANY),
}
ROI_HEAD = {
    "type": ("StandardRoIHead",),
    "bbox_roi_extractor": _pooler("ROI_BOX_HEAD"),
    "bbox_head": BOX_HEAD,
    "shared_head": (None,),
    "init_cfg": ANY,
}
ROI_MASK_HEAD = {"mask_roi_extractor": _pooler("ROI_MASK_HEAD"), "mask_head": MASK_HEAD}
TEST = {
    "rpn": {
        "nms_pre": To("MODEL.RPN.PRE_NMS_TOPK_TEST"),
        "max_per_img": To("MODEL.RPN.POST_NMS_TOPK_TEST"),
        "nms": _nms("MODEL.RPN.NMS_THRESH"),
        "min_bbox_size": (0,),
    },
    "rcnn": {
        "score_thr": To("MODEL.ROI_HEADS.SCORE_THRESH_TEST"),
        "nms": _nms("MODEL.ROI_HEADS.NMS_THRESH_TEST"),
        "max_per_img": To("TEST.DETECTIONS_PER_IMAGE"),
        "mask_thr_binary": (0.5,),
    },
}
PREPROCESSOR = {
    "type": ("DetDataPreprocessor",),
    "mean": To("MODEL.PIXEL_MEAN"),
    "std": To("MODEL.PIXEL_STD"),
    "pad_size_divisor": (32,),
    **dict.fromkeys(("bgr_to_rgb", "rgb_to_bgr", "pad_mask", "batch_augments"), ANY),
}
IMG_NORM = {"mean": To("MODEL.PIXEL_MEAN"), "std": To("MODEL.PIXEL_STD"), "to_rgb": ANY}
DETECTOR = {
    "type": ("FasterRCNN", "MaskRCNN"),
    "backbone": RESNET,
    "rpn_head": RPN_HEAD,
    "roi_head": ROI_HEAD,
    "test_cfg": TEST,
    **dict.fromkeys(("neck", "data_preprocessor", "train_cfg", "init_cfg", "pretrained"), ANY),
}
"""The keys of ``model``, all of which have to be there or have their default."""
