"""ResNets of torchvision, timm and Caffe2 in Detectron2's names, and the config that makes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import Tensor

from nl_detectron.weights.block import AFFINE_NOTE, affine_statistics
from nl_detectron.weights.conversion import Conversion, ConversionError

# riv is called the inverse of the variance, but holds the variance.
CAFFE2_NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}

# Whether it is of bottlenecks, and the blocks in each stage, to MODEL.RESNETS.DEPTH.
DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}

_BLOCK = r"layer(?P<stage>[1-4])\.(?P<block>\d+)\."
_LEAF = r"(?P<leaf>weight|bias|running_mean|running_var)"
_TORCHVISION = (
    (r"conv1\.weight", "stem.conv1.weight"),
    (rf"bn1\.{_LEAF}", "stem.conv1.norm.{leaf}"),
    (rf"{_BLOCK}conv(?P<conv>[123])\.weight", "res{stage}.{block}.conv{conv}.weight"),
    (rf"{_BLOCK}bn(?P<conv>[123])\.{_LEAF}", "res{stage}.{block}.conv{conv}.norm.{leaf}"),
    (rf"{_BLOCK}downsample\.0\.weight", "res{stage}.{block}.shortcut.weight"),
    (rf"{_BLOCK}downsample\.1\.{_LEAF}", "res{stage}.{block}.shortcut.norm.{leaf}"),
    (r"fc\.(?P<leaf>weight|bias)", "linear.{leaf}"),
)
_TORCHVISION_WORDS = {"stage": {"1": "2", "2": "3", "3": "4", "4": "5"}}
# What makes one of timm's many ResNets another network than Detectron2's.
_OTHER_NETWORKS = (
    (r"conv1\.\d+\..+", "a stem of several convolutions (ResNet-C, -D, -T, ...)"),
    (rf"{_BLOCK}downsample\.2\..+", "average pooling in the shortcuts (ResNet-D)"),
    (rf"{_BLOCK}(se|attn)\..+", "attention within its residual blocks"),
    (rf"{_BLOCK}(conv\d\.(?!weight).+|downsample\.\d\.conv.*)", "another kind of convolution"),
    (r".*", "a part that is unknown"),
)
_TORCHVISION_NOTE = """\
Input: RGB with ImageNet's mean and standard deviation, as all of torchvision's weights have it.
timm's say theirs in pretrained_cfg (for 0..1): where it is another, PIXEL_MEAN and PIXEL_STD are
255 times that. Names don't tell BlurPool or dilation, with which the weights compute another thing.
"""

_BRANCH = r"res(?P<stage>[2-5])_(?P<block>\d+)_branch"
_NORM = rf"bn_(?P<leaf>{'|'.join(CAFFE2_NORM)})"
_CAFFE2 = (
    (r"conv1_w", "stem.conv1.weight"),
    (rf"res_conv1_{_NORM}", "stem.conv1.norm.{leaf}"),
    (rf"{_BRANCH}2(?P<conv>[abc])_w", "res{stage}.{block}.conv{conv}.weight"),
    (rf"{_BRANCH}2(?P<conv>[abc])_{_NORM}", "res{stage}.{block}.conv{conv}.norm.{leaf}"),
    (rf"{_BRANCH}1_w", "res{stage}.{block}.shortcut.weight"),
    (rf"{_BRANCH}1_{_NORM}", "res{stage}.{block}.shortcut.norm.{leaf}"),
)
_CAFFE2_WORDS = {"conv": {"a": "1", "b": "2", "c": "3"}, "leaf": CAFFE2_NORM}
_CAFFE2_NOTE = """\
The Caffe2 stem pools without padding, Detectron2's with: features are those of an image moved by
2 pixels, and differ at its border. The 3-D model pools over time after res2; ours sees one frame.
"""
_INFLATED_NOTE = """\
The backbone is left out, as it convolves over time. The blocks alone, in a backbone that they were
not trained with, are no more than a start.
"""


def rename(
    name: str, names: Sequence[tuple[str, str]], words: Mapping[str, Mapping[str, str]]
) -> str | None:
    """
    Our name of a tensor, or None where no pattern matches: ``names`` are patterns, with templates
    of ours from their groups; ``words`` has, by group, theirs to ours; what is missing stays.
    """
    for pattern, template in names:
        if match := re.fullmatch(pattern, name):
            groups = match.groupdict().items()
            return template.format(**{key: words.get(key, {}).get(v, v) for key, v in groups})
    return None


def is_detectron2(names: Iterable[str]) -> bool:
    """Is a ResNet in Detectron2's names among these?"""
    return any(re.fullmatch(r"(.*\.)?res2\.0\.conv1\.weight", name) for name in names)


def is_torchvision(names: Iterable[str]) -> bool:
    """Is a ResNet in torchvision's names among these?"""
    return any(re.fullmatch(r"layer1\.0\.conv1\..+", name) for name in names)


def convert_torchvision(tensors: Mapping[str, Tensor], result: Conversion) -> None:
    """Convert the state dict of a ResNet or ResNeXt of torchvision or timm."""
    for name, tensor in tensors.items():
        target = rename(name, _TORCHVISION, _TORCHVISION_WORDS)
        if target is not None:
            result.add(name, target, tensor)
        elif name.endswith("num_batches_tracked"):
            result.leave_out(name, tensor, "a counter that no fixed-momentum batch norm reads")
        else:
            reason = next(why for other, why in _OTHER_NETWORKS if re.fullmatch(other, name))
            raise ConversionError(f"{name}: {reason}, which Detectron2's ResNet does not have")
    # ImageNet's mean and deviation.
    _add_settings(result, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    result.notes.append(_TORCHVISION_NOTE)


def convert_caffe2_backbone(tensors: Mapping[str, Tensor], result: Conversion) -> None:
    """
    Convert the backbone among tensors that are no block's, if all its convolutions have a temporal
    kernel of 1 (C2D); if not (I3D), leave it out with the reason, as what is no backbone's.
    """
    ours = {name: rename(name, _CAFFE2, _CAFFE2_WORDS) for name in tensors}
    inflated = [n for n, t in tensors.items() if ours[n] and t.dim() == 5 and t.shape[2] > 1]
    for name, tensor in tensors.items():
        target, is_5d = ours[name], tensor.dim() == 5
        if target is None:
            result.leave_out(name, tensor, "neither a non-local block's nor the backbone's")
        elif name in inflated:
            result.leave_out(name, tensor, f"temporal kernel {tensor.shape[2]} has no 2-D form")
        elif inflated:
            result.leave_out(name, tensor, "belongs with the backbone's inflated convolutions")
        else:
            note = "5-D weight (temporal kernel 1) as 4-D" if is_5d else ""
            result.add(name, target, tensor.squeeze(2) if is_5d else tensor, note)
    if inflated:
        result.notes.append(_INFLATED_NOTE)
    elif any(ours.values()):
        for name in [n for n in result.state_dict if n.endswith("norm.weight")]:
            norm = name.removesuffix("weight")
            if f"{norm}running_var" not in result.state_dict and "nonlocal" not in norm:
                for leaf, tensor in affine_statistics(result.state_dict[name]).items():
                    result.add("", f"{norm}{leaf}", tensor, AFFINE_NOTE)
        # Its MODEL.MEAN and STD, for all three channels.
        _add_settings(result, [114.75] * 3, [57.375] * 3)
        result.notes.append(_CAFFE2_NOTE)


def _add_settings(result: Conversion, pixel_mean: list[float], pixel_std: list[float]) -> None:
    """The config of a ResNet; mean and deviation are of red, green, blue from 0 to 255."""
    model = result.settings.setdefault("MODEL", {})
    # Since Facebook's own PyTorch and Caffe2 ResNets, unlike MSRA's, the 3x3 has the stride.
    resnets = {**resnet_config(result.state_dict), "STRIDE_IN_1X1": False}
    model.update(PIXEL_MEAN=pixel_mean, PIXEL_STD=pixel_std, RESNETS=resnets)
    result.settings["INPUT"] = {"FORMAT": "RGB"}


def resnet_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """
    The values of ``MODEL.RESNETS`` that make such a ResNet in Detectron2's names, except
    STRIDE_IN_1X1, which shapes do not tell; a ConversionError names a tensor that does not fit.
    The classifier ``linear`` and non-local blocks are not looked at.
    """
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in state_dict.items()
        if not name.startswith("linear.") and "nonlocal" not in name
    }
    resnets = _depth_and_width(shapes)
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.update(resnets)
    with torch.device("meta"):
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in dict.fromkeys([*expected, *shapes]):
        if shapes.get(name) != expected.get(name):
            raise ConversionError(
                f"{name} has shape {shapes.get(name, 'none (it is missing)')}, but Detectron2's "
                f"ResNet-{resnets['DEPTH']} has {expected.get(name, 'no such tensor')}"
            )
    return resnets


def _depth_and_width(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    counts = tuple(
        len({name.split(".")[1] for name in shapes if name.startswith(f"res{stage}.")})
        for stage in range(2, 6)
    )
    is_bottleneck = "res2.0.conv3.weight" in shapes
    depth = DEPTHS.get((is_bottleneck, counts))
    if depth is None:
        raise ConversionError(
            f"a ResNet of {'bottlenecks' if is_bottleneck else 'basic blocks'}, {counts} in its "
            f"stages; Detectron2 has the depths {', '.join(map(str, DEPTHS.values()))}"
        )
    resnets: dict[str, Any] = {"DEPTH": depth}
    if is_bottleneck:
        width, width_per_group = shapes["res2.0.conv2.weight"][:2]
        resnets.update(NUM_GROUPS=width // width_per_group, WIDTH_PER_GROUP=width_per_group)
    last_conv = "res2.0.conv3.weight" if is_bottleneck else "res2.0.conv2.weight"
    return {**resnets, "RES2_OUT_CHANNELS": shapes[last_conv][0]}
