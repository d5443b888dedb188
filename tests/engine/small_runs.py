"""The code of the project that small_config.py names: a small model and a few pictures."""

from __future__ import annotations

import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet, build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from small_config import CONFIG, OVERRIDES  # this folder is on the path of a project
from torch import nn

import nl_detectron.data.toy  # noqa: F401  its datasets
from nl_detectron.engine import build_config


@BACKBONE_REGISTRY.register()
def build_thin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet-FPN with few channels and blocks."""
    stages = [
        ResNet.make_stage(
            BasicBlock,
            num_blocks,
            stride_per_block=[1 if channels == 16 else 2, 1][:num_blocks],
            in_channels=channels,
            out_channels=channels + 4,
            norm="BN",
        )
        for channels, num_blocks in ((16, 1), (20, 1), (24, 2))
    ]
    stem = BasicStem(input_shape.channels, 16, "BN")
    resnet = ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES)
    return FPN(resnet, cfg.MODEL.FPN.IN_FEATURES, 16)


@BACKBONE_REGISTRY.register()
def build_hungry_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same, but after two pictures the last rank finds no more memory."""
    backbone = build_thin_backbone(cfg, input_shape)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        if is_last and len(calls) > 2:
            raise MemoryError("no more memory")

    backbone.register_forward_hook(fail)
    return backbone


def build_small_model() -> nn.Module:
    """The model of the overrides, less keypoints, for a LazyConfig."""
    return build_model(build_config(CONFIG, [*OVERRIDES, "MODEL.KEYPOINT_ON", "False"]))


def _register_few() -> None:
    """The first pictures of the built-in shapes, for an evaluation that takes no time."""
    for split, count in (("train", 13), ("val", 2)):
        whole = f"shapes_{split}"
        records = DatasetCatalog.get(whole)[:count]
        DatasetCatalog.register(f"few_{split}", lambda records=records: records)
        known = MetadataCatalog.get(whole).as_dict()
        del known["name"], known["json_file"]
        MetadataCatalog.get(f"few_{split}").set(**known)


_register_few()
