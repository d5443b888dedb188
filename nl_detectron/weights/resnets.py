"""ResNets in Detectron2's names: how to get there, and the config that makes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import Tensor

from nl_detectron.weights.conversion import Conversion, ConversionError

# Whether it is of bottlenecks, and the blocks in each stage, to MODEL.RESNETS.DEPTH.
_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def rename(
    name: str, names: Sequence[tuple[str, str]], words: Mapping[str, Mapping[str, str]]
) -> str | None:
    """
    Our name of a tensor, or None where no pattern matches: ``names`` are patterns, with templates
    of ours from their groups; ``words`` has, by group, theirs to ours; what is missing stays.
    """
    for pattern, template in names:
        match = re.fullmatch(pattern, name)
        if match:
            groups = match.groupdict().items()
            return template.format(**{key: words.get(key, {}).get(v, v) for key, v in groups})
    return None


def is_detectron2(names: Iterable[str]) -> bool:
    """Is a ResNet in Detectron2's names among these?"""
    return any(re.fullmatch(r"(.*\.)?res2\.0\.conv1\.weight", name) for name in names)


def add_resnet_settings(
    result: Conversion, pixel_mean: Sequence[float], pixel_std: Sequence[float]
) -> None:
    """
    Give the result, a ResNet whose 3x3 convolutions have the stride, its config; mean and standard
    deviation are of red, green, blue from 0 to 255.
    """
    resnets = resnet_config(result.state_dict)
    model = result.settings.setdefault("MODEL", {})
    model["PIXEL_MEAN"], model["PIXEL_STD"] = list(pixel_mean), list(pixel_std)
    # Since Facebook's own PyTorch and Caffe2 ResNets, unlike MSRA's, the 3x3 has the stride.
    model["RESNETS"] = {**resnets, "STRIDE_IN_1X1": False}
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
    expected = _detectron2_shapes(resnets)
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
    depth = _DEPTHS.get((is_bottleneck, counts))
    if depth is None:
        raise ConversionError(
            f"a ResNet of {'bottlenecks' if is_bottleneck else 'basic blocks'}, {counts} in its "
            f"stages; Detectron2 has the depths {', '.join(map(str, _DEPTHS.values()))}"
        )
    last_conv = "res2.0.conv3.weight" if is_bottleneck else "res2.0.conv2.weight"
    resnets: dict[str, Any] = {"DEPTH": depth}
    if is_bottleneck:
        width, width_per_group = shapes["res2.0.conv2.weight"][:2]
        resnets.update(NUM_GROUPS=width // width_per_group, WIDTH_PER_GROUP=width_per_group)
    return {**resnets, "RES2_OUT_CHANNELS": shapes[last_conv][0]}


def _detectron2_shapes(resnets: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    with torch.device("meta"):
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
