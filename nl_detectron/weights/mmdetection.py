"""
Whole detectors of mmdetection 2.x and 3.x: their tensors in Detectron2's names, and the config that
builds the same detector here.

The config that a checkpoint of theirs carries is read as text. Every key of its model is taken over
or checked to have the one value that Detectron2 computes, as
:mod:`nl_detectron.weights.mmdetection_names` says; a key or a tensor that is not listed there is an
error that names it, so that nothing is dropped or made up.
"""

from __future__ import annotations

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
from nl_detectron.weights.mmdetection_config import nested, read_config, read_detector
from nl_detectron.weights.resnets import rename


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
    config = read_config(config_text or meta.get("cfg") or meta.get("config"))
    changes: Mapping[str, str] = {}
    try:
        if is_1x(tensors):
            tensors, changes = modern_tensors(tensors, config)
            config = modern_config(config)
            result.notes.append(NOTE)
        settings = read_detector(config)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConversionError(f"the config is not as mmdetection has it ({reason})") from error
    classes = meta.get("CLASSES") or meta.get("dataset_meta", {}).get("CLASSES") or ()
    if settings["MODEL.ROI_HEADS.NUM_CLASSES"] != 80:
        settings["DATASETS.TRAIN"] = settings["DATASETS.TEST"] = []
        result.notes.append(f"The classes are {', '.join(map(str, classes)) or 'not in the file'}.")
    result.settings = nested(settings)
    expected = _expected_shapes(result.settings)
    for name, tensor in tensors.items():
        _convert_tensor(name, tensor, expected, changes.get(name, ""), result)
    for name in sorted(expected.keys() - result.state_dict.keys()):
        if not name.endswith("num_batches_tracked"):
            raise ConversionError(f"{name} of the detector of the config is not in the file")
        result.add("", name, torch.zeros((), dtype=torch.long), "0, as the file does not count")


def config_of(settings: Mapping[str, Any]) -> CfgNode:
    """The whole config, not frozen, that has the settings of a converted detector."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(settings))
    return cfg


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


def _expected_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors of the model that a config builds; it is built without memory."""
    cfg = config_of(settings)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in build_model(cfg).state_dict().items()}
