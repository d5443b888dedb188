"""The registered backbones: any other registered one with blocks put into it, and an FPN."""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone

from nl_detectron.config import nonlocal_node
from nl_detectron.modeling.blocks import build_block
from nl_detectron.modeling.first_step import expect_lr_factors
from nl_detectron.modeling.insertion import PlacementError, insert_blocks
from nl_detectron.validation import check_choice


@BACKBONE_REGISTRY.register()
def build_nonlocal_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """
    Build ``cfg.MODEL.NONLOCAL.BACKBONE`` and insert blocks as ``cfg.MODEL.NONLOCAL`` says.

    Args:
        cfg: a config with ``MODEL.NONLOCAL``.
        input_shape: the input's, for the wrapped builder.

    Returns:
        The backbone.

    Raises:
        ValueError: a value in ``MODEL.NONLOCAL`` is not legal; the message names the key.
    """
    node = nonlocal_node(cfg)
    builders = [name for name, _ in BACKBONE_REGISTRY if name != "build_nonlocal_backbone"]
    check_choice("MODEL.NONLOCAL.BACKBONE", node.BACKBONE, sorted(builders))
    backbone = BACKBONE_REGISTRY.get(node.BACKBONE)(cfg, input_shape)
    if not any(node.AFTER_BLOCKS_PER_STAGE):
        return backbone
    expect_lr_factors(backbone, node.GAMMA_LR_FACTOR, node.LR_FACTOR)
    try:
        return insert_blocks(backbone, node.AFTER_BLOCKS_PER_STAGE, partial(build_block, cfg))
    except PlacementError as error:
        raise ValueError(
            f"MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE is {node.AFTER_BLOCKS_PER_STAGE}, a list of "
            f"block indices for each stage of {node.BACKBONE}: {error}"
        ) from error


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_no_top_block_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """
    Detectron2's ``build_resnet_fpn_backbone`` without its ``top_block``, the p6 that is pooled from
    p5: it works with any ``MODEL.FPN.IN_FEATURES``, such as ``[res3, res4]``, whose receptive
    fields are smaller.

    Args:
        cfg: a config; ``MODEL.RESNETS`` and ``MODEL.FPN`` are read.
        input_shape: the input's.

    Returns:
        The FPN.
    """
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
