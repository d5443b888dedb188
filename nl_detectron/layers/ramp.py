"""The sum over the keys on which the ReLU of the concatenation is active, without any pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nl_detectron.layers.first_order import first_order
from nl_detectron.layers.recorded import is_recorded


def ramp_sum(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """
    sum_j ReLU(a_i + b_j) g_j, (B, N_q, c), from (B, N_q), (B, N_k) and (B, N_k, c), all float32 or
    all float64.
    """
    return _sums_over_active(a, b, g)[1] if is_recorded() else _RampSum.apply(a, b, g)


class _RampSum(torch.autograd.Function):
    """
    y_i = sum_j ReLU(a_i + b_j) g_j. Its gradients are sums of the same kind over the same active
    pairs, with the roles of queries and keys exchanged.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, g)
        return _sums_over_active(a, b, g)[1]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        a, b, g = ctx.saved_tensors
        grad_a = (_sums_over_active(a, b, g)[0] * grad_y).sum(2)
        step_sum, grad_g = _sums_over_active(b, a, grad_y)
        return grad_a, (step_sum * g).sum(2), grad_g


def _sums_over_active(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j g_j and sum_j (a_i + b_j) g_j over the j with a_i + b_j > 0; (B, N_q, c) each."""
    # In descending order of b the active keys are a prefix, whose length is the number of
    # -b_j < a_i.
    b, order = b.sort(1, descending=True)
    g = g.gather(1, order.unsqueeze(2).expand_as(g))
    count = _count_below(a, -b)
    active = count.unsqueeze(2).expand(-1, -1, g.shape[2])
    # With b_k the smallest active one, a_i + b_j = (a_i + b_k) + (b_j - b_k), and the sum over j of
    # (b_j - b_k) g_j is one of the steps from each b to the next, times the g so far. No inactive
    # key is seen and nothing large cancels: it is as exact as looking at all pairs.
    smallest = functional.pad(b, (1, 0)).gather(1, count)
    so_far = functional.pad(g.cumsum(1), (0, 0, 1, 0))
    steps = functional.pad(b[:, :-1] - b[:, 1:], (1, 0))
    above = functional.pad((steps.unsqueeze(2) * so_far[:, :-1]).cumsum(1), (0, 0, 1, 0))
    step_sum = so_far.gather(1, active)
    return step_sum, (a + smallest).unsqueeze(2) * step_sum + above.gather(1, active)


def _count_below(x: Tensor, sorted_values: Tensor) -> Tensor:
    """
    How many of the ascending values (B, M) are below each x (B, N). Recordings, for which ONNX has
    to know all operators, may or may not count one that is equal; its pair contributes nothing.
    """
    if not is_recorded():
        return torch.searchsorted(sorted_values, x)
    order = torch.cat([x, sorted_values], 1).argsort(1)
    values_so_far = (order >= x.shape[1]).long().cumsum(1)
    return values_so_far.gather(1, order.argsort(1)[:, : x.shape[1]])
