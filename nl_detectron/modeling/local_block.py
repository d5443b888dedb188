"""A control for experiments: as much computation as in a non-local block, but all of it local."""

from __future__ import annotations

import math

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional

from nl_detectron.layers import NonLocalBlock
from nl_detectron.layers.norm import Norm, build_norm, zero_scale
from nl_detectron.modeling.backbone import build_nonlocal_backbone


class LocalBlock(CNNBlockBase):
    """
    A residual bottleneck, x + norm(conv1x1(relu(conv3x3(relu(conv1x1(x)))))), so wide that it has
    the parameters of a :class:`NonLocalBlock` of the same channels with ``reduction=2``, to within
    1 %. On small feature maps, where the pairs of positions hardly count, it has its FLOPs, too.

    It answers whether a non-local block helps because it is non-local, or because any block would.
    """

    def __init__(self, in_channels: int, *, norm: Norm = "BN", zero_init: bool = True) -> None:
        """
        Args:
            in_channels: C, channels of input and output.
            norm: as for :class:`NonLocalBlock`.
            zero_init: start as the identity: the norm's scale, or the last convolution where there
                is no trainable scale, is zero.
        """
        super().__init__(in_channels, in_channels, stride=1)
        # Equal weights: 2 C w + 9 w^2 = 4 C (C / 2).
        width = round(in_channels * (math.sqrt(19) - 1) / 9)
        self.conv1 = Conv2d(in_channels, width, kernel_size=1)
        self.conv2 = Conv2d(width, width, kernel_size=3, padding=1)
        self.conv3 = Conv2d(width, in_channels, kernel_size=1)
        self.norm = build_norm(norm, in_channels)
        for convolution in (self.conv1, self.conv2, self.conv3):
            weight_init.c2_msra_fill(convolution)
        if zero_init and not zero_scale(self.norm):
            nn.init.zeros_(self.conv3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        z = functional.relu(self.conv1(x))
        z = functional.relu(self.conv2(z))
        z = self.conv3(z)
        return x + (z if self.norm is None else self.norm(z))


@BACKBONE_REGISTRY.register()
def build_local_control_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """
    The backbone of :func:`build_nonlocal_backbone` for the same config, with a :class:`LocalBlock`
    in the place of each non-local block. Of ``MODEL.NONLOCAL`` it obeys ``BACKBONE``,
    ``AFTER_BLOCKS_PER_STAGE``, ``NORM`` and ``ZERO_INIT``.

    Raises:
        ValueError: a value in ``MODEL.NONLOCAL`` is not legal; the message names the key.
    """
    backbone = build_nonlocal_backbone(cfg, input_shape)
    options = {"norm": cfg.MODEL.NONLOCAL.NORM, "zero_init": cfg.MODEL.NONLOCAL.ZERO_INIT}
    for parent in list(backbone.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NonLocalBlock):
                block = LocalBlock(child.in_channels, **options)
                if not any(p.requires_grad for p in child.parameters()):
                    block.freeze()
                setattr(parent, name, block)
    return backbone
