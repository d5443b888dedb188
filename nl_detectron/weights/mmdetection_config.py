"""What a config of mmdetection's says of a detector, in the keys of ours."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from nl_detectron.weights import mmdetection_names as theirs
from nl_detectron.weights.conversion import ConversionError
from nl_detectron.weights.python_config import read_python_config

Settings = dict[str, Any]
"""Values by the names of their keys, such as ``MODEL.RESNETS.DEPTH``."""


def read_config(text: Any) -> dict[str, Any]:
    """The values of a config of a detector, from its text."""
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
    kind = values["type"].replace("ABN", "BN")
    return kind if values.get("requires_grad", True) or kind == "GN" else "FrozenBN"


def _read_backbone(values: Mapping[str, Any], settings: Settings) -> None:
    settings["MODEL.RESNETS.STRIDE_IN_1X1"] = values.get("style") == "caffe"
    settings["MODEL.BACKBONE.FREEZE_AT"] = values.get("frozen_stages", -1) + 1
    norm = settings["MODEL.RESNETS.NORM"] or "BN"
    is_fixed = values.get("norm_eval", True) and norm in ("BN", "SyncBN")
    settings["MODEL.RESNETS.NORM"] = "FrozenBN" if is_fixed else norm
    _read_widths(values, settings)
    plugins = values.get("plugins") or []
    if len(plugins) > 1:
        raise ConversionError(f"model.backbone.plugins are {len(plugins)}; only one is converted")
    for plugin in plugins:
        _read_plugin(plugin, settings)


def _read_widths(values: Mapping[str, Any], settings: Settings) -> None:
    """The stem's channels and those of the first stage, outside and inside of its blocks."""
    width, depth = values.get("base_channels", 64), values.get("depth")
    if depth not in theirs.BLOCKS_OF_DEPTH:
        legal = ", ".join(map(str, theirs.BLOCKS_OF_DEPTH))
        raise ConversionError(f"model.backbone.depth is {depth}; {legal} are converted")
    inner = values.get("base_width", 4) if values["type"] == "ResNeXt" else width
    settings["MODEL.RESNETS.STEM_OUT_CHANNELS"] = values.get("stem_channels") or width
    settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] = 4 * width
    settings["MODEL.RESNETS.WIDTH_PER_GROUP"] = inner


def _read_plugin(plugin: Any, settings: Settings) -> None:
    path = "model.backbone.plugins"
    _read(plugin, theirs.PLUGIN, path, settings)
    block, stages = plugin["cfg"], plugin.get("stages", [True] * 4)
    if block.get("type") == "NonLocal2D":
        settings |= {f"MODEL.NONLOCAL.{key}": value for key, value in theirs.PLAIN_BLOCK.items()}
        _read(block, theirs.NONLOCAL_BLOCK, f"{path}.cfg", settings)
    else:
        _read(block, theirs.CONTEXT_BLOCK, f"{path}.cfg", settings)
        settings["MODEL.NONLOCAL.BLOCK"] = "GlobalContextBlock"
        settings["MODEL.NONLOCAL.REDUCTION"] = round(1 / block["ratio"])
    settings["MODEL.NONLOCAL.BACKBONE"] = settings["MODEL.BACKBONE.NAME"]
    settings["MODEL.BACKBONE.NAME"] = "build_nonlocal_backbone"
    settings["MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE"] = [[], [], [], []]
    counts = theirs.BLOCKS_OF_DEPTH[settings["MODEL.RESNETS.DEPTH"]]
    places = []
    for number, count, where in zip(range(2, 6), counts, stages):
        if plugin.get("position") == "after_sum":
            places += [f"bottom_up.res{number}.{i}.sum" for i in sorted(n % count for n in where)]
        elif where:
            places.append(f"bottom_up.res{number}.*.conv3")
    settings["MODEL.NONLOCAL.AFTER_MODULES"] = places


def _read_neck(values: Any, settings: Settings) -> None:
    fpn, *others = values if isinstance(values, list) else [values]
    _read(fpn, theirs.FPN, "model.neck", settings)
    for neck in others:
        _read(neck, theirs.BFP, "model.neck", settings)
        if "MODEL.NONLOCAL.BLOCK" in settings:
            raise ConversionError(
                "model.backbone.plugins and the BFP in model.neck are blocks of two kinds; a "
                "detector with one of them is converted"
            )
        settings["MODEL.NONLOCAL.BACKBONE"] = settings["MODEL.BACKBONE.NAME"]
        settings["MODEL.BACKBONE.NAME"] = "build_balanced_fpn_backbone"
        refine = neck.get("refine_type")
        block = theirs.PLAIN_BLOCK if refine == "non_local" else theirs.BFP_BLOCKS[refine]
        settings |= {f"MODEL.NONLOCAL.{key}": value for key, value in block.items()}


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
