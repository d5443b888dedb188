"""
Whole detectors of mmdetection 2.x and 3.x: their tensors in Detectron2's names, and the config that
builds the same detector here.

The config that a checkpoint of theirs carries is read as text. Every key of its model is taken over
or checked to have the one value that Detectron2 computes, as
:mod:`nl_detectron.weights.mmdetection_names` says; a key or a tensor that is not listed there is an
error that names it, so that nothing is dropped or made up.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor

from nl_detectron.config import add_nonlocal_config
from nl_detectron.weights import mmdetection_names as theirs
from nl_detectron.weights.conversion import Conversion, ConversionError
from nl_detectron.weights.mmdetection_1x import NOTE, is_1x, modern_config, modern_tensors
from nl_detectron.weights.python_config import read_python_config
from nl_detectron.weights.resnets import rename

Settings = dict[str, Any]
"""Values by the names of their keys, such as ``MODEL.RESNETS.DEPTH``."""


def is_detector(names: Iterable[str]) -> bool:
    """Whether a state dict with these names is a detector of mmdetection's."""
    starts = {name.partition(".")[0] for name in names}
    return "backbone" in starts and bool(starts & {"rpn_head", "roi_head", "bbox_head"})


def convert_detector(
    tensors: Mapping[str, Tensor], meta: Any, config_text: str | None, result: Conversion
) -> None:
    """
    Convert a detector.

    Args:
        tensors: the state dict, in their names.
        meta: what the checkpoint has under "meta": the config as text, and the classes.
        config_text: the config, in the place of that under "meta".
        result: gets the tensors, a complete config, and a row for every tensor of the file.

    Raises:
        ConversionError: the config is missing, or it or a tensor asks for what Detectron2 does not
            compute; the message names the key or the tensor.
    """
    meta = meta if isinstance(meta, Mapping) else {}
    config = _read_config(config_text or meta.get("cfg") or meta.get("config"))
    changes: Mapping[str, str] = {}
    if is_1x(tensors):
        config = modern_config(config)
        tensors, changes = modern_tensors(tensors)
        result.notes.append(NOTE)
    settings = read_detector(config)
    classes = meta.get("CLASSES") or meta.get("dataset_meta", {}).get("CLASSES") or ()
    if settings["MODEL.ROI_HEADS.NUM_CLASSES"] != 80:
        settings["DATASETS.TRAIN"] = settings["DATASETS.TEST"] = []
        result.notes.append(f"The classes are {', '.join(map(str, classes)) or 'not in the file'}.")
    result.settings = nested(settings)
    expected = _expected_shapes(result.settings)
    for name, tensor in tensors.items():
        _convert_tensor(name, tensor, expected, changes.get(name, ""), result)
    if missing := expected.keys() - result.state_dict.keys():
        raise ConversionError(f"{min(missing)} of the detector of the config is not in the file")


def read_detector(config: Mapping[str, Any]) -> Settings:
    """
    Read mmdetection's config of a detector.

    Args:
        config: what :func:`read_python_config` made of it.

    Returns:
        All that our config has to have beside Detectron2's defaults.

    Raises:
        ConversionError: see :func:`convert_detector`.
    """
    settings: Settings = {
        "VERSION": 2,
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "DATASETS.TRAIN": ["coco_2017_train"],
        "DATASETS.TEST": ["coco_2017_val"],
        "SOLVER.BASE_LR": 0.02,
        "SOLVER.STEPS": [60000, 80000],
        "SOLVER.MAX_ITER": 90000,
    }
    model = config["model"]
    table = dict(theirs.DETECTOR)
    has_masks = model.get("type") == "MaskRCNN"
    if has_masks:
        table["roi_head"] = {**theirs.ROI_HEAD, **theirs.ROI_MASK_HEAD}
    _read(model, table, "model", settings)
    settings["MODEL.MASK_ON"] = has_masks
    _read_backbone(model["backbone"], settings)
    _read_neck(model["neck"], settings)
    for head in ("bbox", "mask")[: 1 + has_masks]:
        is_aligned = model["roi_head"][f"{head}_roi_extractor"]["roi_layer"].get("aligned", True)
        key = f"MODEL.ROI_{head.replace('bbox', 'box').upper()}_HEAD.POOLER_TYPE"
        settings[key] = "ROIAlignV2" if is_aligned else "ROIAlign"
    _read_anchors(model["rpn_head"], settings)
    _read_box_head(model["roi_head"]["bbox_head"], settings)
    _read_input(config, settings)
    return settings


def config_of(settings: Mapping[str, Any]) -> CfgNode:
    """The whole config, not frozen, that has the settings of a converted detector."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(settings))
    return cfg


def _read_config(text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise ConversionError(
            "the file has no config of the detector under 'meta', and its tensors do not tell the "
            "colours, the stride and the thresholds: give the config that mmdetection wrote beside "
            "it, with --detector-config FILE.py"
        )
    try:
        config = read_python_config(text)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if not isinstance(config.get("model"), dict):
        raise ConversionError("the config of the detector has no model = dict(...)")
    return config


def _read(values: Any, table: Mapping[str, Any], path: str, settings: Settings) -> None:
    """Take over the values of a dict(...) of theirs as a table says."""
    if not isinstance(values, dict):
        raise ConversionError(f"{path} is {_short(values)}, but must be a dict(...)")
    # The type comes first in every table: it says best what is not converted.
    for key in dict.fromkeys([*table, *values]):
        rule = table.get(key)
        if rule is None:
            raise ConversionError(f"{path}.{key} is {_short(values[key])}, which is not converted")
        place = f"{path}.{key}"
        match rule:
            case theirs.To(key=ours, default=default):
                settings[ours] = values.get(key, default)
            case theirs.Norm(key=ours):
                settings[ours] = _norm(values.get(key), place)
            case dict():
                _read(values.get(key), rule, place, settings)
            case (default, *_) if values.get(key, default) not in rule:
                legal = " or ".join(map(repr, rule))
                raise ConversionError(f"{place} is {_short(values[key])}; {legal} is converted")


def _short(value: Any) -> str:
    """A value in a message: no more than its beginning."""
    return textwrap.shorten(repr(value), 60, placeholder=" ...")


def _norm(values: Any, path: str) -> str:
    """A norm_cfg in the words of Detectron2's get_norm."""
    if values is None:
        return ""
    _read(values, theirs.NORM, path, {})
    is_trained = values.get("requires_grad", True) or values["type"] == "GN"
    return values["type"] if is_trained else "FrozenBN"


def _read_backbone(values: Mapping[str, Any], settings: Settings) -> None:
    settings["MODEL.RESNETS.STRIDE_IN_1X1"] = values.get("style") == "caffe"
    settings["MODEL.BACKBONE.FREEZE_AT"] = values.get("frozen_stages", -1) + 1
    norm = settings["MODEL.RESNETS.NORM"] or "BN"
    is_fixed = values.get("norm_eval", True) and norm in ("BN", "SyncBN")
    settings["MODEL.RESNETS.NORM"] = "FrozenBN" if is_fixed else norm
    blocks = values.get("plugins") or []
    if len(blocks) > 1:
        raise ConversionError(f"model.backbone.plugins are {len(blocks)}; only one is converted")
    for block in blocks:
        _read(block, theirs.PLUGIN, "model.backbone.plugins", settings)
        stages = block.get("stages", [True] * 4)
        settings["MODEL.NONLOCAL.BLOCK"] = "GlobalContextBlock"
        settings["MODEL.NONLOCAL.REDUCTION"] = round(1 / block["cfg"]["ratio"])
        settings["MODEL.NONLOCAL.BACKBONE"] = settings["MODEL.BACKBONE.NAME"]
        settings["MODEL.BACKBONE.NAME"] = "build_nonlocal_backbone"
        settings["MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE"] = [[], [], [], []]
        settings["MODEL.NONLOCAL.AFTER_MODULES"] = [
            f"bottom_up.res{number}.*.conv3" for number, has in enumerate(stages, 2) if has
        ]


def _read_neck(values: Any, settings: Settings) -> None:
    fpn, *others = values if isinstance(values, list) else [values]
    _read(fpn, theirs.FPN, "model.neck", settings)
    for neck in others:
        _read(neck, theirs.BFP, "model.neck", settings)
        if neck.get("refine_type") is None:
            raise ConversionError("model.neck.refine_type is None; 'non_local' is converted")
        settings["MODEL.NONLOCAL.BACKBONE"] = settings["MODEL.BACKBONE.NAME"]
        settings["MODEL.BACKBONE.NAME"] = "build_balanced_fpn_backbone"
        settings |= {f"MODEL.NONLOCAL.{key}": value for key, value in theirs.BFP_BLOCK.items()}


def _read_anchors(values: Mapping[str, Any], settings: Settings) -> None:
    anchors = values["anchor_generator"]
    if len(anchors["scales"]) > 1:
        raise ConversionError("model.rpn_head.anchor_generator.scales: only one is converted")
    sizes = [[anchors["scales"][0] * stride] for stride in anchors["strides"]]
    settings["MODEL.ANCHOR_GENERATOR.SIZES"] = sizes
    settings["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] = [anchors["ratios"]]


def _read_box_head(values: Mapping[str, Any], settings: Settings) -> None:
    counts = {"Shared2FCBBoxHead": (0, 2), "Shared4Conv1FCBBoxHead": (4, 1)}.get(values["type"])
    if counts is not None:
        settings["MODEL.ROI_BOX_HEAD.NUM_CONV"], settings["MODEL.ROI_BOX_HEAD.NUM_FC"] = counts


def _read_input(config: Mapping[str, Any], settings: Settings) -> None:
    """Colours, mean and deviation: of 3.x in the model, of 2.x beside it."""
    values = config["model"].get("data_preprocessor")
    if values is not None:
        _read(values, theirs.PREPROCESSOR, "model.data_preprocessor", settings)
        is_rgb = values.get("bgr_to_rgb", False)
    else:
        values = config.get("img_norm_cfg") or {}
        _read(values, theirs.IMG_NORM, "img_norm_cfg", settings)
        is_rgb = values.get("to_rgb", True)
    settings["INPUT.FORMAT"] = "RGB" if is_rgb else "BGR"
    for step in config.get("test_pipeline") or ():
        scale = step.get("scale") or step.get("img_scale")  # of 3.x, and of 2.x
        if scale is not None:
            settings["INPUT.MIN_SIZE_TEST"], settings["INPUT.MAX_SIZE_TEST"] = sorted(scale)


def _convert_tensor(
    name: str,
    tensor: Tensor,
    expected: Mapping[str, tuple[int, ...]],
    change: str,
    result: Conversion,
) -> None:
    ours = rename(name, theirs.NAMES, theirs.WORDS)
    if name.startswith("ema_"):
        result.leave_out(name, tensor, "a moving average of the training, beside the weights")
    elif ours is None:
        raise ConversionError(f"{name} of shape {tuple(tensor.shape)} has no place in Detectron2")
    elif ours not in expected and ours.endswith("num_batches_tracked"):
        result.leave_out(name, tensor, "a frozen norm counts no batches")
    else:
        if ".nonlocal.norm." in ours:
            tensor, change = tensor.flatten(), "its two dimensions of 1 left out"
        if tuple(tensor.shape) != expected.get(ours):
            raise ConversionError(
                f"{name} would be {ours} of shape {tuple(tensor.shape)}, but the detector of the "
                f"config has {expected.get(ours, 'no such tensor')}"
            )
        result.add(name, ours, tensor, change)


def nested(settings: Settings) -> dict[str, Any]:
    """The settings as a config file has them: a dict in a dict for each dot in a key."""
    nodes: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        node = nodes
        for word in path:
            node = node.setdefault(word, {})
        node[last] = value
    return nodes


def _expected_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors of the model that a config builds; it is built without memory."""
    cfg = config_of(settings)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in build_model(cfg).state_dict().items()}
