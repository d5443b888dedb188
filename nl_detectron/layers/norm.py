"""Detectron2's normalisation layers by name, the same for every version of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from nl_detectron.layers.detectron2_parts import get_norm
from nl_detectron.validation import ArgumentError, check_choice

ZERO_INIT_LAYERS = ("norm", "out")
NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "")
Norm = str | Callable[[int], nn.Module] | None


def build_norm(norm: Norm, channels: int) -> nn.Module | None:
    """
    Args:
        norm: a name that Detectron2's ``get_norm`` knows (the module takes (B, channels, H, W)), a
            callable from channels to a module, or ``""`` or None for no normalisation.
        channels: channels of the input.

    Returns:
        The module; None for no normalisation.

    Raises:
        ValueError: the name is unknown, or "GN" (32 groups) does not divide the channels.
    """
    if norm is None or norm == "":
        return None
    if callable(norm):
        return norm(channels)
    check_choice("norm", norm, NORMS)
    if norm == "GN" and channels % 32:
        raise ArgumentError("norm", f'"GN" has 32 groups, which do not divide {channels} channels')
    # Detectron2 0.6 has no "LN".
    return ChannelLayerNorm(channels) if norm == "LN" else get_norm(norm, channels)


def make_identity(layer: str, norm: nn.Module | None, out: nn.Module) -> None:
    """
    Make a block that ends in ``norm(out(y))`` the identity, in place.

    Args:
        layer: one of :data:`ZERO_INIT_LAYERS`, the layer whose weights become zero: "norm" (its
            scale, gamma), or "out". It is always "out" if the norm has no scale that is trained:
            with both at zero, or a frozen zero, the block could never learn.
        norm: what :func:`build_norm` returns.
        out: the convolution before it.
    """
    gamma = getattr(norm, "weight", None)
    # FrozenBN's scale is a buffer: zero, it would stay zero.
    if layer == "norm" and isinstance(gamma, nn.Parameter):
        nn.init.zeros_(gamma)
    else:
        nn.init.zeros_(out.get_parameter("weight"))


def inference_scale(norm: nn.Module | None) -> Tensor | None:
    """
    Args:
        norm: what :func:`build_norm` returns.

    Returns:
        (C,), what a batch norm multiplies each channel by in inference, gamma / sigma; None for no
        norm, and for those whose sigma depends on the input.
    """
    variance = getattr(norm, "running_var", None)
    if norm is None or variance is None:
        return None
    gamma = getattr(norm, "weight", None)
    return (variance + norm.eps).rsqrt() * (1 if gamma is None else gamma)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each position."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (B, C, H, W), floating point.

        Returns:
            Same shape and dtype.
        """
        x = x.movedim(1, -1)
        # Not super().forward: TorchScript does not know it.
        x = functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)
