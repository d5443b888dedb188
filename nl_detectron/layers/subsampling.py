"""Fewer keys than positions: pooling in space of features (B, C, *grid)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nl_detectron.layers.recorded import is_compiling, is_recorded

Pool = Callable[[Tensor], Tensor]

SUBSAMPLE = ("none", "embeddings", "input", "pyramid")
"""What ``NonLocalBlock`` may do to its keys."""

PYRAMID = (1, 3, 6, 8)
"""The bins of each level of the pyramid along each dimension, as in ANN's APNB
(https://arxiv.org/abs/1908.07678, Section 3.2): 110 in an image."""


def max_pool(x: Tensor) -> Tensor:
    """
    Max-pooling of (B, C, *grid) with kernel and stride 2 in space, where a dimension of size 1 is
    left alone, to half the size, rounded down. Time, the first of three dimensions, is not pooled.
    """
    images = _as_images(x)
    kernel = [2 if size > 1 else 1 for size in images.shape[2:]]
    learns = torch.is_grad_enabled() and x.requires_grad
    if kernel == [2, 2] and x.device.type == "cpu" and not (learns or is_recorded()):
        # PyTorch's own also looks for the places of the maxima, and takes 14 times as long.
        rows = torch.maximum(images[:, :, :-1:2], images[:, :, 1::2])
        pooled = torch.maximum(rows[..., :-1:2], rows[..., 1::2])
    else:
        pooled = functional.max_pool2d(images, kernel, kernel)
    if x.dim() == 3:
        return pooled.squeeze(2)
    return pooled.unflatten(1, x.shape[1:3]) if x.dim() == 5 else pooled


def pyramid_pool(x: Tensor) -> Tensor:
    """
    The means over :data:`PYRAMID` bins in each spatial dimension of (B, C, *grid), of any size: (B,
    C, 18), (B, C, 110) or, since time is not pooled, (B, C, T, 110). The levels follow each other,
    each row by row; bins overlap where their number does not divide the size.
    """
    images = _as_images(x)
    levels = [average_pool(images, 1 if x.dim() == 3 else bins, bins) for bins in PYRAMID]
    pooled = torch.cat([level.flatten(2) for level in levels], 2)
    return pooled.unflatten(1, x.shape[1:3]) if x.dim() == 5 else pooled


def keys_and_pool(x: Tensor, subsample: str, commutes: bool) -> tuple[Tensor, Pool]:
    """What phi, m and g are given, and what pools what they make of it: means before, if legal."""
    if subsample == "embeddings":
        return x, max_pool
    if subsample == "pyramid" and not commutes:
        return x, pyramid_pool
    if subsample == "pyramid":
        pooled = pyramid_pool(x)
        return (pooled if x.dim() == 3 else pooled.unsqueeze(-1)), nn.Identity()
    return max_pool(x) if subsample == "input" else x, nn.Identity()


def spread_over_bins(weights: Tensor, grid: Sequence[int]) -> Tensor:
    """
    Give the weight of each of the pyramid's bins to the cells that it is the mean of, in equal
    parts. A weighted sum of the bins is the same weighted sum of the cells.

    Args:
        weights: (..., 110), of the bins of an image: the levels of 1, 3, 6 and 8 bins in each
            dimension follow each other, each row by row.
        grid: rows and columns of the image.

    Returns:
        (..., rows, columns), with the same sums.
    """
    levels = []
    for bins, part in zip(PYRAMID, weights.split([bins * bins for bins in PYRAMID], -1)):
        of_rows, of_columns = (_bin_weights(size, bins, weights) for size in grid)
        levels.append(of_rows.mT @ part.unflatten(-1, (bins, bins)) @ of_columns)
    return torch.stack(levels).sum(0)


def average_pool(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, C, H, W) to the means of (B, C, rows, columns) bins: adaptive average pooling."""
    if torch.onnx.is_in_onnx_export() or is_compiling():
        # ONNX has adaptive pooling only where the bins divide the size, and that at one size.
        height, width = x.shape[2], x.shape[3]
        return _bin_weights(height, rows, x) @ x @ _bin_weights(width, columns, x).transpose(0, 1)
    return functional.adaptive_avg_pool2d(x, (rows, columns))


def _as_images(x: Tensor) -> Tensor:
    """(B, C, L) as (B, C, 1, L), and each moment of (B, C, T, H, W) as channels (B, C T, H, W)."""
    if x.dim() == 3:
        return x.unsqueeze(2)
    return x.flatten(1, 2) if x.dim() == 5 else x


def _bin_weights(size: int, bins: int, like: Tensor) -> Tensor:
    """(bins, size): the weights by which adaptive average pooling sums up positions to bins."""
    position = torch.arange(size, device=like.device)
    number = torch.arange(bins, device=like.device).unsqueeze(1)
    # From floor(number size / bins) to ceil((number + 1) size / bins), which is left out.
    start = number * size // bins
    stop = ((number + 1) * size + bins - 1) // bins
    inside = (position >= start) & (position < stop)
    return inside.to(like.dtype) / (stop - start).to(like.dtype)
