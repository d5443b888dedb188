"""timm's attention layers (SE, ECA, CBAM, ...) as blocks that start as the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nl_detectron.layers.detectron2_parts import CNNBlockBase
from nl_detectron.validation import ArgumentError, check_choice

TIMM_ATTENTION = (
    *("se", "ese", "eca", "ecam", "ceca", "ge", "gc", "gca", "cbam", "lcbam"),
    *("coord", "scoord", "ela", "strip", "sk", "splat", "lambda"),
)
"""
Those of ``timm.layers.create_attn`` that keep the shape of an image of any size. "nl" is not among
them: it starts as the identity itself, and two zeros would never learn.
"""

# timm 1.0 fails with its own default; without this part it is GE-theta^-, without parameters.
_OPTIONS = {"ge": {"use_mlp": False}}


class TimmAttention(CNNBlockBase):
    """
    z = x + gamma (A(x) - x), with A one of timm's attention layers. Those rescale or replace their
    input, which harms a trained network; with gamma, one number for each channel, at zero the block
    is the identity, and learns how much of A each channel can do with.
    """

    def __init__(self, in_channels: int, *, timm: str = "se", zero_init: bool = True) -> None:
        """
        Args:
            in_channels: C, channels of input and output.
            timm: the name of A in ``timm.layers.create_attn``, one of :data:`TIMM_ATTENTION`.
            zero_init: start as the identity, with gamma at zero; else with gamma at one, as A.

        Raises:
            ValueError: an unknown name, or one that the installed timm cannot make.
            ImportError: timm is not installed.
        """
        super().__init__(in_channels, in_channels, stride=1)
        check_choice("timm", timm, TIMM_ATTENTION)
        try:
            from timm.layers import create_attn
        except ImportError as error:
            raise ImportError("TimmAttention needs timm: pip install timm") from error
        try:
            self.attention = create_attn(timm, in_channels, **_OPTIONS.get(timm, {}))
        except Exception as error:  # each layer refuses channels in its own way
            problem = f"is {timm!r}, which timm does not make for {in_channels} channels"
            raise ArgumentError("timm", f"{problem}: {error!r}") from error
        self.gamma = nn.Parameter(torch.full((in_channels, 1, 1), 0.0 if zero_init else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (B, C, H, W), floating point; B may be 0.

        Returns:
            z, same shape and dtype.
        """
        if x.numel() == 0:  # no regions: timm fails, and distributed training waits for gradients
            return x + 0 * sum(parameter.sum() for parameter in self.parameters())
        return x + self.gamma * (self.attention(x) - x)
