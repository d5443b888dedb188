"""The sum over the keys on which the ReLU of the concatenation is active, without any pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from nl_detectron.layers.recorded import is_recorded


def ramp_sum(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """
    sum_j ReLU(a_i + b_j) g_j.

    Args:
        a: (B, N_q), float32 or float64.
        b: (B, N_k), same dtype.
        g: (B, N_k, c), same dtype.

    Returns:
        (B, N_q, c), same dtype.
    """
    return sums_over_active(a, b, g)[1] if is_recorded() else _RampSum.apply(a, b, g)


class _RampSum(torch.autograd.Function):
    """
    y_i = sum_j ReLU(a_i + b_j) g_j. Its gradients are sums of the same kind over the same active
    pairs, with the roles of queries and keys exchanged.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, g)
        return sums_over_active(a, b, g)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        a, b, g = ctx.saved_tensors
        grad_a = (sums_over_active(a, b, g)[0] * grad_y).sum(2)
        step_sum, grad_g = sums_over_active(b, a, grad_y)
        return grad_a, (step_sum * g).sum(2), grad_g


def sums_over_active(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """
    The sums of :func:`ramp_sum` and of its slope, as what is scripted takes them.

    Args:
        a: (B, N_q), float32 or float64.
        b: (B, N_k), same dtype.
        g: (B, N_k, c), same dtype.

    Returns:
        sum_j g_j and sum_j (a_i + b_j) g_j over the j with a_i + b_j > 0; (B, N_q, c) each.
    """
    # In descending order of b the active keys are a prefix, whose length is the number of
    # -b_j < a_i.
    b, order = b.sort(1, descending=True)
    g = g.gather(1, order.unsqueeze(2).expand_as(g))
    active = _count_below(a, -b).unsqueeze(2).expand(-1, -1, g.shape[2])
    # For the sums only a + b matters: centring b keeps a * sum g and sum b g from being large
    # numbers that cancel.
    centre = b.sum(1, keepdim=True) / max(b.shape[1], 1)
    a, b = a + centre, b - centre
    step_sum = _sum_of_first(active, g)
    return step_sum, a.unsqueeze(2) * step_sum + _sum_of_first(active, b.unsqueeze(2) * g)


def _count_below(x: Tensor, sorted_values: Tensor) -> Tensor:
    """
    How many of the ascending values (B, M) are below each x (B, N). Recordings, for which ONNX has
    to know all operators, may or may not count one that is equal; its pair contributes nothing.
    """
    if not torch.jit.is_scripting() and not is_recorded():
        return torch.searchsorted(sorted_values, x)
    order = torch.cat([x, sorted_values], 1).argsort(1)
    values_so_far = (order >= x.shape[1]).long().cumsum(1)
    return values_so_far.gather(1, order.argsort(1)[:, : x.shape[1]])


def _sum_of_first(count: Tensor, x: Tensor) -> Tensor:
    """Sums of the first count (B, N, c) of x (B, M, c) over the positions."""
    return functional.pad(x, (0, 0, 1, 0)).cumsum(1).gather(1, count)
