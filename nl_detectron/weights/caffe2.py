"""The backbone of video-nonlocal-net (Caffe2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nl_detectron.weights.block import AFFINE_NOTE, affine_statistics
from nl_detectron.weights.conversion import Conversion
from nl_detectron.weights.resnets import add_resnet_settings, rename

# riv is called the inverse of the variance, but holds the variance.
NORM_LEAVES = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}

_BRANCH = r"res(?P<stage>[2-5])_(?P<block>\d+)_branch"
_NORM = rf"bn_(?P<leaf>{'|'.join(NORM_LEAVES)})"
_NAMES = (
    (r"conv1_w", "stem.conv1.weight"),
    (rf"res_conv1_{_NORM}", "stem.conv1.norm.{leaf}"),
    (rf"{_BRANCH}2(?P<conv>[abc])_w", "res{stage}.{block}.conv{conv}.weight"),
    (rf"{_BRANCH}2(?P<conv>[abc])_{_NORM}", "res{stage}.{block}.conv{conv}.norm.{leaf}"),
    (rf"{_BRANCH}1_w", "res{stage}.{block}.shortcut.weight"),
    (rf"{_BRANCH}1_{_NORM}", "res{stage}.{block}.shortcut.norm.{leaf}"),
)
_WORDS = {"conv": {"a": "1", "b": "2", "c": "3"}, "leaf": NORM_LEAVES}

# Its MODEL.MEAN and STD, for all three channels.
_PIXEL_MEAN, _PIXEL_STD = [114.75] * 3, [57.375] * 3
_NOTE = """\
The Caffe2 stem pools without padding, Detectron2's with: features are those of an image moved by
2 pixels, and differ at its border. The 3-D model pools over time after res2; ours sees one frame.
"""
_INFLATED_NOTE = """\
The backbone is left out, as it convolves over time. The blocks alone, in a backbone that they were
not trained with, are no more than a start.
"""


def convert_caffe2_backbone(tensors: Mapping[str, Tensor], result: Conversion) -> None:
    """
    Convert the backbone among tensors that are no block's, if all its convolutions have a temporal
    kernel of 1 (C2D); if not (I3D), leave it out with the reason, as what is no backbone's.
    """
    ours = {name: rename(name, _NAMES, _WORDS) for name in tensors}
    inflated = [n for n, t in tensors.items() if ours[n] and t.dim() == 5 and t.shape[2] > 1]
    for name, tensor in tensors.items():
        target = ours[name]
        if target is None:
            result.leave_out(name, tensor, "neither a non-local block's nor the backbone's")
        elif name in inflated:
            result.leave_out(name, tensor, f"temporal kernel {tensor.shape[2]} has no 2-D form")
        elif inflated:
            result.leave_out(name, tensor, "belongs with the backbone's inflated convolutions")
        else:
            is_5d = tensor.dim() == 5
            note = "5-D weight (temporal kernel 1) as 4-D" if is_5d else ""
            result.add(name, target, tensor.squeeze(2) if is_5d else tensor, note)
    if inflated:
        result.notes.append(_INFLATED_NOTE)
    elif any(ours.values()):
        _add_affine_statistics(result)
        add_resnet_settings(result, _PIXEL_MEAN, _PIXEL_STD)
        result.notes.append(_NOTE)


def _add_affine_statistics(result: Conversion) -> None:
    for name in [n for n in result.state_dict if n.endswith("norm.weight")]:
        norm = name[: -len("weight")]
        if f"{norm}running_var" not in result.state_dict and "nonlocal" not in norm:
            for leaf, tensor in affine_statistics(result.state_dict[name]).items():
                result.add("", f"{norm}{leaf}", tensor, AFFINE_NOTE)
