"""
Detectors of mmdetection 1.x, such as GCNet's and DNL's own, in the form that 2.x gave them.

In 1.x the background is the first class, RoIAlign is not aligned, and a box ends with its last
pixel: with a box that ends behind it, Detectron2's arithmetic is the same if anchors are centred in
their cells. What stays different is that 1.x rounds its anchors to whole pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nl_detectron.weights.conversion import ConversionError
from nl_detectron.weights.families import FAMILIES

NOTE = (
    "mmdetection 1.x rounds its anchors to whole pixels, and its boxes are a pixel wider; here "
    "anchors are not rounded, so that boxes differ by up to a pixel and AP by a little."
)
# What has norms, their kinds that are in-place ABN, and the names of their weights.
_PARTS, _IN_PLACE = ("backbone", "neck", "bbox_head", "mask_head"), ("ABN", "SyncABN")
_NORM_WEIGHT = re.compile(r".*\.(bn\d?|downsample\.1)\.weight")
# The keys of blocks in a backbone, and their kinds as plug-ins.
_BLOCKS: Mapping[str, dict[str, Any]] = {
    "gcb": {"type": "ContextBlock"},
    "nlb": {"type": "NonLocal2D", "fixbug": False},
}
_ROI_HEAD = ("bbox_roi_extractor", "bbox_head", "mask_roi_extractor", "mask_head")


def is_1x(names: Iterable[str]) -> bool:
    """Whether a detector with these tensors has two stages and is of 1.x."""
    starts = {name.partition(".")[0] for name in names}
    return {"rpn_head", "bbox_head"} <= starts


def modern_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of 1.x with the keys of 2.x."""
    model = dict(config["model"])
    # In 2.x the heads on regions are one part, and the kinds of layers have parts of their own.
    model["roi_head"] = {"type": "StandardRoIHead"}
    for key in _ROI_HEAD:
        if key in model:
            model["roi_head"][key] = dict(model.pop(key))
    heads = model["roi_head"]
    for key in ("bbox_roi_extractor", "mask_roi_extractor"):
        if key in heads:
            heads[key]["roi_layer"] = _renamed(
                {"aligned": False, **heads[key]["roi_layer"]},
                {"out_size": "output_size", "sample_num": "sampling_ratio"},
            )
    for key in ("bbox_head", "mask_head"):
        if key in heads:
            heads[key]["num_classes"] -= 1  # without the background
    box_head = _with_coder(heads["bbox_head"])
    if box_head["type"] == "SharedFCBBoxHead":
        box_head["type"] = "ConvFCBBoxHead"
        box_head["num_shared_fcs"] = box_head.pop("num_fcs", 2)
    heads["bbox_head"] = box_head

    rpn_head = _with_coder(model["rpn_head"])
    names = {"anchor_scales": "scales", "anchor_ratios": "ratios", "anchor_strides": "strides"}
    rpn_head["anchor_generator"] = {
        "type": "AnchorGenerator",
        "center_offset": 0.5,
        **{new: rpn_head.pop(old) for old, new in names.items()},
    }
    model["rpn_head"] = rpn_head
    model["backbone"] = _with_plugins(model["backbone"])
    model["test_cfg"] = _thresholds(config.get("test_cfg"))
    return {**config, "model": model}


def modern_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    The tensors as 2.x has them, by their names in 2.x; and for those changed, how. ``config`` is
    1.x's.
    """
    modern, notes = {}, {}
    in_place = tuple(f"{part}." for part in _PARTS if _norm_of(config, part) in _IN_PLACE)
    after_sum = _is_after_sum(config["model"]["backbone"].get("stage_with_gcb"))
    for name, tensor in tensors.items():
        note = ""
        if name.startswith(in_place) and _NORM_WEIGHT.fullmatch(name):
            tensor, note = tensor.abs() + 1e-5, "|weight| + 1e-5, as in-place ABN computes"
        if name.startswith(("bbox_head.", "mask_head.")):
            name = f"roi_head.{name}"
        if after_sum:
            name = name.replace(".context_block.", ".sum.context_block.")
        if name.startswith("roi_head.bbox_head.fc_cls."):
            tensor, note = torch.cat([tensor[1:], tensor[:1]]), "the background last, not first"
        elif name.startswith("roi_head.bbox_head.fc_reg.") and len(tensor) > 4:
            tensor, note = tensor[4:], "without the background's box"
        elif name.startswith("roi_head.mask_head.conv_logits.") and len(tensor) > 1:
            tensor, note = tensor[1:], "without the background's mask"
        modern[name], notes[name] = tensor, note
    return modern, notes


def _norm_of(config: Mapping[str, Any], part: str) -> Any:
    values = config["model"].get(part)
    norm = values.get("norm_cfg") if isinstance(values, Mapping) else None
    return norm.get("type") if isinstance(norm, Mapping) else None


def _is_after_sum(stages: Any) -> bool:
    """Does it name blocks of stages, as DNL-Object-Detection does, and not whole stages?"""
    return any(isinstance(stage, list) for stage in stages or ())


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}


def _with_coder(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a head whose means and deviations of box deltas 2.x has in a part of their own."""
    head = dict(values)
    coder = {key: head.pop(key) for key in ("target_means", "target_stds")}
    return {**head, "bbox_coder": {"type": "DeltaXYWHBBoxCoder", **coder}}


def _with_plugins(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Of a backbone whose blocks 2.x has as plug-ins. "after_sum", before the last ReLU of a residual
    block, is the place that DNL-Object-Detection's blocks have; 2.x has no such.
    """
    backbone, plugins = dict(values), []
    if backbone.pop("nlgcb", None) is not None:
        raise ConversionError(f"model.backbone.nlgcb: {FAMILIES['dnl'].refusal}")
    backbone.pop("stage_with_nlgcb", None)
    for key, default in _BLOCKS.items():
        block, stages = backbone.pop(key, None), backbone.pop(f"stage_with_{key}", None)
        if block is not None:
            position = "after_sum" if _is_after_sum(stages) else "after_conv3"
            plugins.append({"cfg": default | block, "stages": stages, "position": position})
    return {**backbone, "plugins": plugins}


def _thresholds(test: Any) -> dict[str, Any]:
    if not isinstance(test, Mapping):
        raise ConversionError("the config has no test_cfg = dict(...)")
    rpn, rcnn = dict(test["rpn"]), dict(test["rcnn"])
    if rpn.pop("nms_across_levels", False):
        raise ConversionError("test_cfg.rpn.nms_across_levels is True; False is converted")
    rpn["nms"] = {"type": "nms", "iou_threshold": rpn.pop("nms_thr")}
    rpn["max_per_img"] = rpn.pop("max_num")
    rpn.pop("nms_post", None)  # of a level; max_num is of all, and no more
    rcnn["nms"] = _renamed(rcnn["nms"], {"iou_thr": "iou_threshold"})
    return {"rpn": rpn, "rcnn": rcnn}
