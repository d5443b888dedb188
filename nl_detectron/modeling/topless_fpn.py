"""An FPN without Detectron2's top level, for backbones that do not reach res5."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone


@BACKBONE_REGISTRY.register()
def build_resnet_topless_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """
    Detectron2's ``build_resnet_fpn_backbone`` but for p6, which is pooled from p5: it works with
    any ``MODEL.FPN.IN_FEATURES``, such as ``[res3, res4]``, whose receptive fields are smaller.
    """
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
