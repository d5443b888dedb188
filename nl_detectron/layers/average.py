"""softmax(m) g, the same weights for all queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nl_detectron.layers.first_order import first_order
from nl_detectron.layers.numerics import MAX_SUMMED, accumulable, no_autocast
from nl_detectron.layers.recorded import is_recorded


def softmax_average(logits: Tensor, g: Tensor) -> Tensor:
    """
    The operation with an f that depends on j only, f = exp(logits_j): y is the same for every i.

    Args:
        logits: (B, N_k), floating point.
        g: (B, N_k, c), floating point.

    Returns:
        (B, c), dtype of g; float32 for half precision.
    """
    if not is_recorded():
        return _SoftmaxAverage.apply(logits, g)
    g = accumulable(g)
    weights = accumulable(logits).softmax(1).to(g.dtype)
    return (weights.unsqueeze(1) @ g).squeeze(1)


class _SoftmaxAverage(torch.autograd.Function):
    """In float32 or better, whatever the dtype of g, some of the positions at a time."""

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
