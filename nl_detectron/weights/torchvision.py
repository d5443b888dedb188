"""ResNets and ResNeXts of torchvision and timm, which have the same names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from nl_detectron.weights.conversion import Conversion, ConversionError
from nl_detectron.weights.resnets import add_resnet_settings, rename

_BLOCK = r"layer(?P<stage>[1-4])\.(?P<block>\d+)\."
_LEAF = r"(?P<leaf>weight|bias|running_mean|running_var)"
_NAMES = (
    (r"conv1\.weight", "stem.conv1.weight"),
    (rf"bn1\.{_LEAF}", "stem.conv1.norm.{leaf}"),
    (rf"{_BLOCK}conv(?P<conv>[123])\.weight", "res{stage}.{block}.conv{conv}.weight"),
    (rf"{_BLOCK}bn(?P<conv>[123])\.{_LEAF}", "res{stage}.{block}.conv{conv}.norm.{leaf}"),
    (rf"{_BLOCK}downsample\.0\.weight", "res{stage}.{block}.shortcut.weight"),
    (rf"{_BLOCK}downsample\.1\.{_LEAF}", "res{stage}.{block}.shortcut.norm.{leaf}"),
    (r"fc\.(?P<leaf>weight|bias)", "linear.{leaf}"),
)
_WORDS = {"stage": {"1": "2", "2": "3", "3": "4", "4": "5"}}

# What makes one of timm's many ResNets another network than Detectron2's.
_OTHER_NETWORKS = (
    (r"conv1\.\d+\..+", "a stem of several convolutions (ResNet-C, -D, -T, ...)"),
    (rf"{_BLOCK}downsample\.2\..+", "average pooling in the shortcuts (ResNet-D)"),
    (rf"{_BLOCK}(se|attn)\..+", "attention within its residual blocks"),
    (rf"{_BLOCK}(conv\d\.(?!weight).+|downsample\.\d\.conv.*)", "another kind of convolution"),
    (r".*", "a part that is unknown"),
)
# ImageNet's.
_PIXEL_MEAN, _PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
_NOTE = """\
Input: RGB with ImageNet's mean and standard deviation, as all of torchvision's weights have it.
timm's say theirs in pretrained_cfg (for 0..1): where it is another, PIXEL_MEAN and PIXEL_STD are
255 times that. Names don't tell BlurPool or dilation, with which the weights compute another thing.
"""


def is_torchvision(names: Iterable[str]) -> bool:
    """Is a ResNet in torchvision's names among these?"""
    return any(re.fullmatch(r"layer1\.0\.conv1\..+", name) for name in names)


def convert_torchvision(tensors: Mapping[str, Tensor], result: Conversion) -> None:
    """Convert the state dict of a ResNet of torchvision or timm."""
    for name, tensor in tensors.items():
        target = rename(name, _NAMES, _WORDS)
        if target is not None:
            result.add(name, target, tensor)
        elif name.endswith("num_batches_tracked"):
            result.leave_out(name, tensor, "a counter that no fixed-momentum batch norm reads")
        else:
            reason = next(why for other, why in _OTHER_NETWORKS if re.fullmatch(other, name))
            raise ConversionError(f"{name}: {reason}, which Detectron2's ResNet does not have")
    add_resnet_settings(result, _PIXEL_MEAN, _PIXEL_STD)
    result.notes.append(_NOTE)
