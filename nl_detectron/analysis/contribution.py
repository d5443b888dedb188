"""What the places of a block's input count for: by weight, by contribution, by their effect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nl_detectron.layers import AttentionBlock, spread_over_bins

_MAX_PAIRS = 2**22  # pairs of query and key that are held at a time
_FLOAT32_DIGITS = 1e-6


@torch.no_grad()
def weights_on_grid(
    block: AttentionBlock, x: Tensor, cells: Tensor | Sequence[tuple[int, int]]
) -> Tensor:
    """
    The block's weights, (Q, key rows, key columns), for what it is given, x (1, C, rows, columns),
    and Q queries, as ``positions`` in :meth:`AttentionBlock.attention`; those of a pyramid, spread
    over its bins' cells.
    """
    weights = block.attention(x, cells)[0].float()
    return spread_over_bins(weights, x.shape[2:]) if block.subsample == "pyramid" else weights


@torch.no_grad()
def contributions_on_grid(
    block: AttentionBlock, x: Tensor, cells: Tensor | Sequence[tuple[int, int]]
) -> Tensor:
    """
    As :func:`weights_on_grid`, how much each place adds to a query that the others do not: the
    length of w_ij u_j - mean_k w_ik u_k, with u the block's :meth:`AttentionBlock.values`. No
    tensor has an entry for each query, key and channel.
    """
    on_grid = weights_on_grid(block, x, cells)
    weights = on_grid.flatten(1).double()
    values = block.values(x)[0].flatten(1).double()
    mean = weights @ values.mT / weights.shape[1]
    whole = weights.square() * values.square().sum(0)
    squares = whole - 2 * weights * (mean @ values) + mean.square().sum(1, keepdim=True)
    # Places that add the same differ by rounding.
    squares[squares < _FLOAT32_DIGITS**2 * whole.amax(1, keepdim=True)] = 0
    return squares.sqrt().float().view_as(on_grid)


@torch.no_grad()
def effect_on_grid(block: AttentionBlock, x: Tensor, gradient: Tensor) -> Tensor:
    """
    The effect of each place, (key rows, key columns), of either sign, by what it adds to all
    queries, on a number such as an object's score, to first order:
    sum_i w_ij (d number / d z_i)^T (u_j - mean u). The gradient (1, C, rows, columns) is that of
    the number with respect to the block's output z.
    """
    values = block.values(x)[0].float()
    values = values - values.mean((1, 2), keepdim=True)
    slopes = gradient[0].float().flatten(1).mT
    effect = torch.zeros_like(values[0])
    for queries in torch.arange(len(slopes)).split(max(_MAX_PAIRS // effect.numel(), 1)):
        of_pairs = (slopes[queries] @ values.flatten(1)).view(-1, *effect.shape)
        effect += (weights_on_grid(block, x, queries) * of_pairs).sum(0)
    return effect


ON_GRID = {"weights": weights_on_grid, "contributions": contributions_on_grid}
"""What a map of a query may show. A map of an object's score shows "effect"."""
WHAT = (*ON_GRID, "effect")
"""What a map may show."""
