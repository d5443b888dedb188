"""A control for experiments: as much computation as in a non-local block, but all of it local."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from nl_detectron.layers.detectron2_parts import CNNBlockBase
from nl_detectron.layers.norm import ZERO_INIT_LAYERS, Norm, build_norm, make_identity
from nl_detectron.validation import check_choice


class LocalBlock(CNNBlockBase):
    """
    A residual bottleneck, x + norm(conv1x1(relu(conv3x3(relu(conv1x1(x)))))), so wide that it has
    the parameters of a :class:`NonLocalBlock` of the same channels with ``reduction=2``, to within
    1 %. On small feature maps, where the pairs of positions hardly count, it has its FLOPs, too (of
    the form that makes theta and y).

    It answers whether a non-local block helps because it is non-local, or because any block would.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        norm: Norm = "BN",
        zero_init: bool = True,
        zero_init_layer: str = "norm",
    ) -> None:
        """
        Make a block with random weights that is the identity, if ``zero_init`` is left at True.

        Args:
            in_channels: C, channels of input and output.
            norm: as for :class:`NonLocalBlock`.
            zero_init: start as the identity, with the weights of ``zero_init_layer`` at zero.
            zero_init_layer: "norm" (its scale) or "out" (the last convolution), as for
                :class:`NonLocalBlock`.

        Raises:
            ValueError: an unknown norm or ``zero_init_layer``.
        """
        super().__init__(in_channels, in_channels, stride=1)
        check_choice("zero_init_layer", zero_init_layer, ZERO_INIT_LAYERS)
        # Equal weights: 2 C w + 9 w^2 = 4 C (C / 2).
        width = round(in_channels * (math.sqrt(19) - 1) / 9)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(width, in_channels, kernel_size=1)
        self.norm = build_norm(norm, in_channels)
        for convolution in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.get_parameter("bias"))
        if zero_init:
            make_identity(zero_init_layer, self.norm, self.conv3)

    def forward(self, x: Tensor) -> Tensor:
        """
        Add to each position what its neighbourhood gives.

        Args:
            x: (B, C, H, W), floating point.

        Returns:
            Same shape and dtype.
        """
        z = functional.relu(self.conv1(x))
        z = functional.relu(self.conv2(z))
        z = self.conv3(z)
        return x + (z if self.norm is None else self.norm(z))
