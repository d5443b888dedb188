"""What the layers take from Detectron2, and what stands in for it where there is PyTorch alone."""

from __future__ import annotations

try:
    from detectron2.layers import CNNBlockBase, get_norm
except ModuleNotFoundError as _error:
    if _error.name != "detectron2":  # it is there, but lacks something itself
        raise
    from torch import nn

    class CNNBlockBase(nn.Module):  # type: ignore[no-redef]
        """Detectron2's, without ``freeze``, for which only its own backbones have a use."""

        def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
            super().__init__()
            self.in_channels = in_channels
            self.out_channels = out_channels
            self.stride = stride

    def get_norm(norm: str, channels: int) -> nn.Module:
        """The module that Detectron2 takes for this name; ImportError if it is its own."""
        if norm == "BN":
            return nn.BatchNorm2d(channels)
        if norm in ("SyncBN", "nnSyncBN"):
            return nn.SyncBatchNorm(channels)
        if norm == "GN":
            return nn.GroupNorm(32, channels)
        raise ImportError(f"norm {norm!r} is Detectron2's, which is not installed here")


__all__ = ["CNNBlockBase", "get_norm"]
