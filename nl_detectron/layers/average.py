"""softmax(m) g, the same weights for all queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nl_detectron.layers.first_order import first_order
from nl_detectron.layers.numerics import MAX_SUMMED, accumulable, no_autocast


def chunked_average(logits: Tensor, g: Tensor) -> Tensor:
    """
    sum_j softmax_j(logits_j) g_j, some of the positions at a time; see :class:`_ChunkedAverage`.

    Args:
        logits: (B, N), floating point.
        g: (B, N, c), floating point.

    Returns:
        (B, c), dtype of g; float32 for half precision.
    """
    return _ChunkedAverage.apply(logits, g)


class _ChunkedAverage(torch.autograd.Function):
    """
    sum_j softmax_j(logits_j) g_j in float32 or better, whatever the dtype of g, of which no second
    copy is kept or made as a whole.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, g: Tensor) -> Tensor:
        with no_autocast(g):
            weights = accumulable(logits).softmax(1)
            weights = weights / weights.sum(1, keepdim=True)  # exact enough, see _TiledSoftmax
            weights = weights.to(accumulable(g[:0]).dtype)
            parts = zip(weights.split(MAX_SUMMED, 1), g.split(MAX_SUMMED, 1))
            y = sum((part.unsqueeze(1) @ accumulable(values) for part, values in parts))
        ctx.save_for_backward(logits, g, weights, y)
        return y.squeeze(1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        logits, g, weights, y = ctx.saved_tensors
        grad_g, product = torch.empty_like(g), torch.empty_like(weights)
        # What is not copied to another dtype needs no parts.
        size = max(1, g.shape[1]) if g.dtype == weights.dtype else MAX_SUMMED
        with no_autocast(g):
            for start in range(0, g.shape[1], size):
                part = slice(start, start + size)
                outer = weights[:, part].unsqueeze(2), grad_y.unsqueeze(1)
                if g.dtype == weights.dtype:
                    torch.mul(*outer, out=grad_g)  # in the layout of g
                else:
                    grad_g[:, part] = torch.mul(*outer)
                product[:, part] = (accumulable(g[:, part]) @ grad_y.unsqueeze(2)).squeeze(2)
            # The softmax's Jacobian.
            grad_logits = weights * (product - (y @ grad_y.unsqueeze(2)).squeeze(2))
        return grad_logits.to(logits.dtype), grad_g
