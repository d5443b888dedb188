"""How far the operations in float32 are from the equations in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nl_detectron.benchmark.measure import relative_difference
from nl_detectron.benchmark.textbook import textbook_concatenation, textbook_operation
from nl_detectron.layers import (
    concatenation_pairwise,
    dot_product_pairwise,
    softmax_pairwise,
)

POSITIONS = (1_000, 10_000, 70_000)
QUICK_POSITIONS = (1_000,)
# With mean 0 the terms of the long sums cancel; with mean 3 the sums grow large.
MEANS = (0.0, 3.0)
CHANNELS = 32
# theta and phi; for the concatenation a and b, their products with w_f.
QUANTITIES = ("y", "grad theta or a", "grad phi or b", "grad g")

# The reference takes so many pairs (i, j) at a time: 8 MiB in float64.
_PAIRS_PER_BLOCK = 2**20

_Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def _softmax(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    return softmax_pairwise(theta, phi, g, CHANNELS**-0.5)


def _textbook_softmax(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    return textbook_operation(theta, phi, g, "embedded_gaussian", CHANNELS**-0.5)


def _textbook_dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    return textbook_operation(theta, phi, g, "dot_product")


# Ours and the equation.
OPERATIONS: dict[str, tuple[_Operation, _Operation]] = {
    "softmax_pairwise": (_softmax, _textbook_softmax),
    "dot_product_pairwise": (dot_product_pairwise, _textbook_dot_product),
    "concatenation_pairwise": (concatenation_pairwise, textbook_concatenation),
}


@dataclass(frozen=True)
class Accuracy:
    """
    The errors of one operation on inputs that are normally distributed around ``mean``: for each
    of ``QUANTITIES`` max |error| / max |reference|, over all positions and channels.
    """

    function: str
    positions: int
    mean: float
    errors: dict[str, float]


def measure_accuracy(function: str, positions: int, mean: float, device: torch.device) -> Accuracy:
    """
    Args:
        function: one of ``OPERATIONS``, with 32 channels.
        positions: N, of queries and keys alike.
        mean: of the inputs and of the gradient of y; their variance is 1.
        device: where both are computed; it has to know float64.
    """
    torch.manual_seed(0)
    width = () if function == "concatenation_pairwise" else (CHANNELS,)
    shapes = [(1, positions, *width)] * 2 + [(1, positions, CHANNELS)] * 2
    *inputs, cotangent = (torch.randn(shape, device=device) + mean for shape in shapes)
    ours, equation = OPERATIONS[function]
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = ours(*leaves)
    actual = [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]
    expected = _blockwise(equation, *(t.double() for t in (*inputs, cotangent)))
    errors = [relative_difference([a.double()], [e]) for a, e in zip(actual, expected)]
    return Accuracy(function, positions, mean, dict(zip(QUANTITIES, errors)))


def _blockwise(
    operation: _Operation, queries: Tensor, keys: Tensor, g: Tensor, cotangent: Tensor
) -> list[Tensor]:
    """y and the gradients of queries, keys and g, by autograd, some of the queries at a time."""
    keys, g = keys.requires_grad_(), g.requires_grad_()
    # Results of each block, kept as they come, would leave the heap in pieces.
    y, of_queries = torch.empty_like(cotangent), torch.empty_like(queries)
    of_keys, of_g = torch.zeros_like(keys), torch.zeros_like(g)
    size = max(1, _PAIRS_PER_BLOCK // keys.shape[1])
    for start in range(0, queries.shape[1], size):
        block = slice(start, start + size)
        leaf = queries[:, block].clone().requires_grad_()
        result = operation(leaf, keys, g)
        gradients = torch.autograd.grad(result, (leaf, keys, g), cotangent[:, block])
        y[:, block], of_queries[:, block] = result.detach(), gradients[0]
        of_keys += gradients[1]
        of_g += gradients[2]
    return [y, of_queries, of_keys, of_g]
