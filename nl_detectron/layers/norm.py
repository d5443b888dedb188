"""Detectron2's normalisation layers by name, the same for every version of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from nl_detectron.layers.children import in_full_precision
from nl_detectron.layers.detectron2_parts import get_norm
from nl_detectron.validation import ArgumentError, check_choice

ZERO_INIT_LAYERS = ("norm", "out")
NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "")
Norm = str | Callable[[int], nn.Module] | None


def build_norm(norm: Norm, channels: int) -> nn.Module | None:
    """
    The norm of that name, for (B, channels, H, W), or of a callable from channels to a module; None
    for ``""`` and None. ValueError: it is unknown, or has groups that do not divide the channels.
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
    Make a block that ends in ``norm(out(y))`` the identity, in place: the scale of "norm" or the
    weights of "out" become zero. It is always "out" if the norm has no scale that is trained: with
    both at zero, or a frozen zero, the block could never learn.
    """
    gamma = getattr(norm, "weight", None)
    # FrozenBN's scale is a buffer: zero, it would stay zero.
    if layer == "norm" and isinstance(gamma, nn.Parameter):
        nn.init.zeros_(gamma)
    else:
        nn.init.zeros_(out.get_parameter("weight"))


def inference_scale(norm: nn.Module | None) -> Tensor | None:
    """
    (C,), what a batch norm multiplies each channel by in inference, gamma / sigma; None for no
    norm, and for those whose sigma depends on the input.
    """
    variance = getattr(norm, "running_var", None)
    if norm is None or variance is None:
        return None
    gamma = getattr(norm, "weight", None)
    return (variance + norm.eps).rsqrt() * (1 if gamma is None else gamma)


def scaled(z: Tensor, norm: nn.Module | None) -> Tensor:
    """
    z (B, C, *grid), float32 or float64, times what a norm in evaluation mode multiplies by: gamma /
    sigma of a batch norm; gamma of a norm whose sigma depends on the input.
    """
    if norm is None:
        return z
    ones = [1] * (z.dim() - 2)
    normalized = in_full_precision(norm, z)
    if any(name.endswith("running_var") for name, _ in norm.named_buffers()):
        return normalized - in_full_precision(norm, z.new_zeros(1, z.shape[1], *ones))
    # The call has brought a weight up to date that is computed before each, as a pruned one is.
    gamma = getattr(norm, "weight", None)
    return z if gamma is None else gamma.to(z.dtype).view(-1, *ones) * z


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
