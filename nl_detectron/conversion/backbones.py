"""Backbones: ResNets and ResNeXts of torchvision, timm and Caffe2 in Detectron2's names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import Tensor

from nl_detectron.conversion.report import Conversion, ConversionError

Names = Sequence[tuple[str, str]]

_LAYER = r"layer(?P<layer>[1-4])\.(?P<block>\d+)\."
_NORM_LEAF = r"(?P<leaf>weight|bias|running_mean|running_var)"

# Patterns of their names, and ours.
TORCHVISION_NAMES: Names = (
    (r"conv1\.weight", "stem.conv1.weight"),
    (rf"bn1\.{_NORM_LEAF}", "stem.conv1.norm.{leaf}"),
    (rf"{_LAYER}conv(?P<conv>[123])\.weight", "res{stage}.{block}.conv{conv}.weight"),
    (rf"{_LAYER}bn(?P<conv>[123])\.{_NORM_LEAF}", "res{stage}.{block}.conv{conv}.norm.{leaf}"),
    (rf"{_LAYER}downsample\.0\.weight", "res{stage}.{block}.shortcut.weight"),
    (rf"{_LAYER}downsample\.1\.{_NORM_LEAF}", "res{stage}.{block}.shortcut.norm.{leaf}"),
    (r"fc\.(?P<leaf>weight|bias)", "linear.{leaf}"),
)
_BRANCH = r"res(?P<stage>[2-5])_(?P<block>\d+)_branch"
CAFFE2_NAMES: Names = (
    (r"conv1_w", "stem.conv1.weight"),
    (r"res_conv1_bn_(?P<blob>s|b|rm|riv)", "stem.conv1.norm.{leaf}"),
    (rf"{_BRANCH}2(?P<letter>[abc])_w", "res{stage}.{block}.conv{conv}.weight"),
    (
        rf"{_BRANCH}2(?P<letter>[abc])_bn_(?P<blob>s|b|rm|riv)",
        "res{stage}.{block}.conv{conv}.norm.{leaf}",
    ),
    (rf"{_BRANCH}1_w", "res{stage}.{block}.shortcut.weight"),
    (rf"{_BRANCH}1_bn_(?P<blob>s|b|rm|riv)", "res{stage}.{block}.shortcut.norm.{leaf}"),
)
_CONV_OF_LETTER = {"a": 1, "b": 2, "c": 3}
_LEAF_OF_BLOB = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}

# What makes one of timm's many ResNets another network than Detectron2's.
_OTHER_NETWORKS = (
    (r"conv1\.\d+\..+", "a stem of several convolutions (ResNet-C, -D, -T, ...)"),
    (rf"{_LAYER}downsample\.2\..+", "average pooling in the shortcuts (ResNet-D)"),
    (rf"{_LAYER}(se|attn)\..+", "attention within its residual blocks"),
    (rf"{_LAYER}(conv\d\.(?!weight).+|downsample\.\d\.conv.*)", "another kind of convolution"),
)

# Is it a bottleneck, and how many blocks are in each stage: MODEL.RESNETS.DEPTH.
_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
_IMAGENET_INPUT = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
# video-nonlocal-net's MODEL.MEAN and STD, for all three channels.
_CAFFE2_INPUT = {"mean": [114.75] * 3, "std": [57.375] * 3}

TORCHVISION_NOTE = """\
Input: RGB with ImageNet's mean and standard deviation, as all of torchvision's weights have it.
timm's say theirs in pretrained_cfg (for 0..1): where it is another, PIXEL_MEAN and PIXEL_STD are
255 times that. Names don't tell BlurPool or dilation, with which the weights compute another thing.
"""
CAFFE2_NOTE = """\
The Caffe2 stem pools without padding, Detectron2's with: features are those of an image moved by
2 pixels, and differ at its border. The 3-D model pools over time after res2; ours sees one frame.
"""
INFLATED_NOTE = """\
The backbone is left out, as it convolves over time. The blocks alone, in a backbone that they were
not trained with, are no more than a start.
"""


def is_torchvision(names: Iterable[str]) -> bool:
    return any(re.fullmatch(r"layer1\.0\.conv1\..+", name) for name in names)


def is_detectron2(names: Iterable[str]) -> bool:
    return any(re.fullmatch(r"(.*\.)?res2\.0\.conv1\.weight", name) for name in names)


def convert_torchvision(tensors: Mapping[str, Tensor], result: Conversion) -> None:
    """
    Add the ResNet of torchvision or timm in ``tensors`` to ``result``.

    Raises:
        ConversionError: Detectron2 has no such ResNet.
    """
    for name, tensor in tensors.items():
        target = _rename(name, TORCHVISION_NAMES)
        if target is not None:
            result.add(name, target, tensor)
        elif name.endswith("num_batches_tracked"):
            result.leave_out(name, tensor, "a counter that no fixed-momentum batch norm reads")
        else:
            raise ConversionError(
                f"{name}: {_why_not(name)}, which Detectron2's ResNet does not have"
            )
    resnets = check_resnet(result.state_dict)
    _add_settings(result, resnets, _IMAGENET_INPUT)
    result.notes.append(TORCHVISION_NOTE)


def convert_caffe2(tensors: Mapping[str, Tensor], result: Conversion) -> None:
    """
    Add the backbone of a Caffe2 video model to ``result``, if it is a 2-D one in 3-D clothes (C2D);
    leave it out with the reason if it is not (I3D). What is no backbone's is left out too.

    Raises:
        ConversionError: Detectron2 has no such ResNet.
    """
    targets = {name: _rename(name, CAFFE2_NAMES) for name in tensors}
    backbone = {name: target for name, target in targets.items() if target is not None}
    inflated = [n for n in backbone if tensors[n].dim() == 5 and tensors[n].shape[2] > 1]
    for name, tensor in tensors.items():
        if name in inflated:
            result.leave_out(name, tensor, f"temporal kernel {tensor.shape[2]} has no 2-D form")
        elif name in backbone and inflated:
            result.leave_out(name, tensor, "belongs with the backbone's inflated convolutions")
        elif name in backbone:
            is_5d = tensor.dim() == 5
            note = "5-D weight (temporal kernel 1) as 4-D" if is_5d else ""
            result.add(name, backbone[name], tensor.squeeze(2) if is_5d else tensor, note)
        else:
            result.leave_out(name, tensor, "neither a non-local block's nor the backbone's")
    if inflated:
        result.notes.append(INFLATED_NOTE)
    if not backbone or inflated:
        return
    _add_affine_statistics(result)
    resnets = check_resnet({n: t for n, t in result.state_dict.items() if "nonlocal" not in n})
    _add_settings(result, resnets, _CAFFE2_INPUT)
    result.notes.append(CAFFE2_NOTE)


def check_resnet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """
    Args:
        tensors: a ResNet in Detectron2's names; ``linear``, its classifier, is not looked at.

    Returns:
        The values of ``MODEL.RESNETS`` that make such a ResNet, but STRIDE_IN_1X1, which shapes
        don't tell.

    Raises:
        ConversionError: none do; the message names a tensor that does not fit.
    """
    counts = tuple(
        len({n.split(".")[1] for n in tensors if n.startswith(f"res{stage}.")})
        for stage in range(2, 6)
    )
    is_bottleneck = "res2.0.conv3.weight" in tensors
    depth = _DEPTHS.get((is_bottleneck, counts))
    if depth is None:
        raise ConversionError(
            f"a ResNet of {'bottlenecks' if is_bottleneck else 'basic blocks'}, {counts} in its "
            f"stages; Detectron2 has the depths {', '.join(map(str, _DEPTHS.values()))}"
        )
    resnets: dict[str, Any] = {"DEPTH": depth}
    if is_bottleneck:
        width, width_per_group = tensors["res2.0.conv2.weight"].shape[:2]
        resnets.update(NUM_GROUPS=width // width_per_group, WIDTH_PER_GROUP=width_per_group)
    resnets["RES2_OUT_CHANNELS"] = tensors[f"res2.0.conv{3 if is_bottleneck else 2}.weight"].shape[
        0
    ]
    expected = _detectron2_shapes(resnets)
    given = {n: tuple(t.shape) for n, t in tensors.items() if not n.startswith("linear.")}
    for name in dict.fromkeys([*expected, *given]):
        if given.get(name) != expected.get(name):
            raise ConversionError(
                f"{name} has shape {given.get(name, 'none (it is missing)')}, but Detectron2's "
                f"ResNet-{depth} has {expected.get(name, 'no such tensor')}"
            )
    return resnets


def _detectron2_shapes(resnets: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    with torch.device("meta"):
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _rename(name: str, names: Names) -> str | None:
    for pattern, template in names:
        match = re.fullmatch(pattern, name)
        if match:
            found = match.groupdict()
            if "layer" in found:
                found["stage"] = str(int(found["layer"]) + 1)
            if "letter" in found:
                found["conv"] = str(_CONV_OF_LETTER[found["letter"]])
            if "blob" in found:
                found["leaf"] = _LEAF_OF_BLOB[found["blob"]]
            return template.format(**found)
    return None


def _why_not(name: str) -> str:
    for pattern, reason in _OTHER_NETWORKS:
        if re.fullmatch(pattern, name):
            return reason
    return "a part that is unknown"


def _add_affine_statistics(result: Conversion) -> None:
    """A Caffe2 affine layer, a multiplication and an addition, is a frozen batch norm of (0, 1)."""
    for name in [n for n in result.state_dict if n.endswith("norm.weight")]:
        weight, norm = result.state_dict[name], name[: -len("weight")]
        if f"{norm}running_var" not in result.state_dict and "nonlocal" not in norm:
            note = "no statistics in the file: multiplication and addition only"
            result.add("", f"{norm}running_mean", torch.zeros_like(weight), note)
            result.add("", f"{norm}running_var", torch.full_like(weight, 1 - 1e-5), note)


def _add_settings(
    result: Conversion, resnets: Mapping[str, Any], pixels: Mapping[str, list[float]]
) -> None:
    model = result.settings.setdefault("MODEL", {})
    model["PIXEL_MEAN"], model["PIXEL_STD"] = pixels["mean"], pixels["std"]
    # Since Facebook's own PyTorch and Caffe2 ResNets, unlike MSRA's, the 3x3 has the stride.
    model["RESNETS"] = {**resnets, "STRIDE_IN_1X1": False}
    result.settings["INPUT"] = {"FORMAT": "RGB"}
