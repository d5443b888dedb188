"""The registered backbones: any other registered one with blocks put into it, and an FPN."""

from __future__ import annotations

import math
from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from torch import nn
from torch.nn import functional

from nl_detectron.config import OUR_BACKBONES, nonlocal_node
from nl_detectron.layers import BalancedPyramid
from nl_detectron.modeling.blocks import NONLOCAL_BLOCK_REGISTRY, build_block
from nl_detectron.modeling.first_step import Inserted, announce_at_first_step, expect_lr_factors
from nl_detectron.modeling.insertion import put_blocks
from nl_detectron.modeling.stages import PlacementError
from nl_detectron.surgery import CHILD, attach
from nl_detectron.validation import check_choice


@BACKBONE_REGISTRY.register()
def build_nonlocal_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """
    Build ``cfg.MODEL.NONLOCAL.BACKBONE`` and insert blocks as ``cfg.MODEL.NONLOCAL`` says.

    Raises:
        ValueError: a value in ``MODEL.NONLOCAL`` is not legal; the message names the key.
    """
    backbone, node = _build_wrapped(cfg, input_shape), cfg.MODEL.NONLOCAL
    inserted: list[Inserted] = []
    for key, kind in [
        ("AFTER_BLOCKS_PER_STAGE", "block indices for each stage"),
        ("AFTER_MODULES", "names or patterns of modules"),
    ]:
        try:
            inserted += put_blocks(backbone, node[key], partial(build_block, cfg))
        except PlacementError as error:
            raise ValueError(
                f"MODEL.NONLOCAL.{key} is {node[key]}, a list of {kind} of {node.BACKBONE}: {error}"
            ) from error
    announce_at_first_step(backbone, inserted)
    return backbone


@BACKBONE_REGISTRY.register()
def build_balanced_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """
    Build ``cfg.MODEL.NONLOCAL.BACKBONE``, an FPN, and balance its levels, as Libra R-CNN does, with
    the block that ``cfg.MODEL.NONLOCAL`` describes: the child ``nonlocal``, applied to what the FPN
    returns. Its places for other blocks are not read. ``IdentityBlock`` and ``ConvReLUBlock`` are
    Libra R-CNN's other refinements.

    Raises:
        ValueError: a value in ``MODEL.NONLOCAL`` is not legal, or the levels have different numbers
            of channels.
    """
    fpn = _build_wrapped(cfg, input_shape)
    levels = fpn.output_shape()
    channels = {level.channels for level in levels.values()}
    if len(channels) > 1:
        raise ValueError(
            f"MODEL.NONLOCAL.BACKBONE is {cfg.MODEL.NONLOCAL.BACKBONE!r}, whose outputs have "
            f"{sorted(channels)} channels, but must be an FPN, whose outputs have the same"
        )
    middle = min(levels, key=lambda name: abs(math.log2(levels[name].stride / 16)))
    block = build_block(cfg, *channels)
    attach(fpn, BalancedPyramid(block, middle))
    if any(True for _ in block.parameters()):
        announce_at_first_step(fpn, [(CHILD, block, *channels)])
    return fpn


@NONLOCAL_BLOCK_REGISTRY.register()
def IdentityBlock(cfg: CfgNode, in_channels: int) -> nn.Module:
    """What changes nothing: with it a pyramid is balanced without being refined."""
    return nn.Identity()


@NONLOCAL_BLOCK_REGISTRY.register()
def ConvReLUBlock(cfg: CfgNode, in_channels: int) -> nn.Module:
    """A 3x3 convolution and a ReLU, Libra R-CNN's other refinement."""
    return Conv2d(in_channels, in_channels, 3, padding=1, activation=functional.relu)


def _build_wrapped(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    node = nonlocal_node(cfg)
    builders = [name for name, _ in BACKBONE_REGISTRY if name not in OUR_BACKBONES]
    check_choice("MODEL.NONLOCAL.BACKBONE", node.BACKBONE, sorted(builders))
    backbone = BACKBONE_REGISTRY.get(node.BACKBONE)(cfg, input_shape)
    expect_lr_factors(backbone, node.GAMMA_LR_FACTOR, node.LR_FACTOR)
    return backbone


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_no_top_block_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """
    Detectron2's ``build_resnet_fpn_backbone`` without its ``top_block``, the p6 that is pooled from
    p5: it works with any ``MODEL.FPN.IN_FEATURES``, such as ``[res3, res4]``, whose receptive
    fields are smaller.
    """
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
