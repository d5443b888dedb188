"""
Detectors of mmdetection 1.x, such as GCNet's own, in the form that 2.x gave them.

In 1.x the background is the first class, RoIAlign is not aligned, and a box ends with its last
pixel: with a box that ends behind it, Detectron2's arithmetic is the same if anchors are centred in
their cells. What stays different is that 1.x rounds its anchors to whole pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nl_detectron.weights.conversion import ConversionError

NOTE = (
    "mmdetection 1.x rounds its anchors to whole pixels, and its boxes are a pixel wider; here "
    "anchors are not rounded, so that boxes differ by up to a pixel and AP by a little."
)
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


def modern_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors as 2.x has them, by their names in 2.x; and for those changed, how."""
    modern, notes = {}, {}
    for name, tensor in tensors.items():
        if name.startswith(("bbox_head.", "mask_head.")):
            name = f"roi_head.{name}"
        if name.startswith("roi_head.bbox_head.fc_cls."):
            tensor = torch.cat([tensor[1:], tensor[:1]])
            notes[name] = "the background last, not first"
        elif name.startswith("roi_head.bbox_head.fc_reg.") and len(tensor) > 4:
            tensor, notes[name] = tensor[4:], "without the background's box"
        elif name.startswith("roi_head.mask_head.conv_logits.") and len(tensor) > 1:
            tensor, notes[name] = tensor[1:], "without the background's mask"
        modern[name] = tensor
    return modern, notes


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}


def _with_coder(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a head whose means and deviations of box deltas 2.x has in a part of their own."""
    head = dict(values)
    coder = {key: head.pop(key) for key in ("target_means", "target_stds")}
    return {**head, "bbox_coder": {"type": "DeltaXYWHBBoxCoder", **coder}}


def _with_plugins(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a backbone whose blocks 2.x has as plug-ins."""
    backbone = dict(values)
    block, stages = backbone.pop("gcb", None), backbone.pop("stage_with_gcb", None)
    if block is None:
        return backbone
    if any(isinstance(stage, list) for stage in stages or ()):
        raise ConversionError(
            "model.backbone.stage_with_gcb has lists, as in DNL-Object-Detection: its blocks come "
            "between the sum and the last ReLU of a residual block, where Detectron2 has no place"
        )
    cfg = {"type": "ContextBlock", **block}
    return {**backbone, "plugins": [{"cfg": cfg, "stages": stages, "position": "after_conv3"}]}


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
