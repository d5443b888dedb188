"""
The non-local operation of "Non-local Neural Networks" (https://arxiv.org/abs/1711.07971, Eq. 1),

    y_i = 1 / C(x) * sum_j f(x_i, x_j) g(x_j),

for the four pairwise functions f of Section 3.2 and that of "Disentangled Non-Local Neural
Networks" (https://arxiv.org/abs/2006.06668), on tensors whose positions are already flattened.
All are exact, and none of them holds a tensor with an entry for every pair (i, j) of a large input:

=================== ============================== ======= ======================================
pairwise function   f(x_i, x_j)                    C(x)    cost (N positions, d = c channels)
=================== ============================== ======= ======================================
(embedded) Gaussian exp(scale * theta_i^T phi_j)   sum f   O(N^2 d) time, O(N d) memory
dot product         theta_i^T phi_j                N_k     O(min(N^2 d, N d^2)) time
concatenation       ReLU(a_i + b_j)                N_k     O(N log N + N d) time
disentangled        two softmaxes, see there               as the Gaussians
=================== ============================== ======= ======================================

Shapes, here and below: B is the batch, N_q the number of positions y is computed at (the queries),
N_k the number of positions that are summed over (the keys; fewer than N_q when they are
subsampled), d the channels of theta and phi, c those of g. B and N_q may be 0.

Half precision inputs are accumulated in float32. The softmax kinds return the dtype of ``g``: their
y is an average of g, so it fits. The 1 / N_k kinds return float32 for float16 inputs: their y is a
product of three embeddings and may well not fit.

Gradients are exact. Only the dot product has gradients of gradients.

What is recorded to be run elsewhere (by tracing, torch.export, torch.compile, for ONNX) is made of
PyTorch's own operators only, in a form that holds for every input size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nl_detectron.layers.average import softmax_average
from nl_detectron.layers.numerics import (
    MAX_SUMMED,
    accumulable,
    no_autocast,
    saturated,
    sum_of_products,
)
from nl_detectron.layers.ramp import ramp_sum
from nl_detectron.layers.recorded import is_recorded
from nl_detectron.layers.softmax import softmax_pairwise, softmax_weights


def dot_product_pairwise(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """
    The operation with f = theta_i^T phi_j and C = N_k (Eq. 4).

    It is a product of three matrices; multiplying the cheaper pair first is exact, and for large
    inputs that is theta (phi^T g): no N_q x N_k matrix appears.

    Args:
        theta: (B, N_q, d), floating point.
        phi: (B, N_k, d), same dtype.
        g: (B, N_k, c), same dtype.

    Returns:
        (B, N_q, c), same dtype; float32 if that is float16.
    """
    with no_autocast(theta):
        y = _triple_product(accumulable(theta), accumulable(phi), accumulable(g))
    return y.to(sum_dtype(theta.dtype))


def dot_product_weights(pairs: Tensor) -> Tensor:
    """The weights f / C of :func:`dot_product_pairwise` from all theta_i^T phi_j, (B, N_q, N_k)."""
    return pairs / pairs.shape[2]


def _triple_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    queries, d = theta.shape[1], theta.shape[2]
    keys, c = g.shape[1], g.shape[2]
    pairs_first, channels_first = queries * keys * (d + c), (queries + keys) * d * c
    if not is_recorded() and pairs_first < channels_first:  # else for other sizes, too
        return (theta @ phi.mT / keys) @ g
    return products_of_queries(theta, dot_product_context(phi, g)).transpose(1, 2)


def dot_product_context(phi: Tensor, g: Tensor) -> Tensor:
    """phi^T g / N_k, (B, d, c)."""
    g = g / g.shape[1]
    return phi.transpose(1, 2) @ g if is_recorded() else sum_of_products(phi.transpose(1, 2), g)


def products_of_queries(theta: Tensor, context: Tensor) -> Tensor:
    """The transpose of theta (B, N_q, d) times context (B, d, c): (B, c, N_q), contiguous."""
    # In chunks for the sake of the backward pass, which sums over the queries.
    parts = (theta,) if is_recorded() else theta.split(MAX_SUMMED, 1)
    products = [torch.bmm(context.transpose(1, 2), part.transpose(1, 2)) for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products, 2)


def concatenation_pairwise(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """
    The operation with f = ReLU(w_f^T [theta_i, phi_j]) and C = N_k (Eq. 5).

    w_f^T [theta_i, phi_j] is the sum of a query's part a_i = w_theta^T theta_i and a key's part
    b_j = w_phi^T phi_j. In the order of b, the keys on which the ReLU is active for a query are a
    suffix, so that prefix sums of g and of b * g give y without looking at any pair.

    Args:
        a: (B, N_q), floating point.
        b: (B, N_k), same dtype.
        g: (B, N_k, c), same dtype.

    Returns:
        (B, N_q, c), same dtype; float32 if that is float16.
    """
    with no_autocast(g):
        y = ramp_sum(accumulable(a), accumulable(b), accumulable(g))
    return (y / b.shape[1]).to(sum_dtype(g.dtype))


def concatenation_weights(pairs: Tensor) -> Tensor:
    """The weights f / C of :func:`concatenation_pairwise` from all a_i + b_j, (B, N_q, N_k)."""
    return pairs.relu() / pairs.shape[2]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a product of three embeddings: bfloat16 has the range for it, float16 not."""
    return torch.float32 if dtype == torch.float16 else dtype


def disentangled_pairwise(theta: Tensor, phi: Tensor, m: Tensor, g: Tensor, scale: float) -> Tensor:
    """
    The operation of a disentangled non-local block (DNL, Eq. 12): the weights are

        softmax_j(scale * (theta_i - mean theta)^T (phi_j - mean phi)) + softmax_j(m_j),

    what a pair has in common and what a key has for every query. The mean of phi need not be taken
    off: (theta_i - mean theta)^T (mean phi) is the same for all j, and a softmax over j does not
    see it.

    Args:
        theta: (B, N_q, d), floating point; all queries, since their mean counts.
        phi: (B, N_k, d), same dtype.
        m: (B, N_k), same dtype.
        g: (B, N_k, c), same dtype.
        scale: multiplies the logits of the pairs: d ** -0.5 / temperature.

    Returns:
        (B, N_q, c), dtype of g.
    """
    y = softmax_pairwise(whitened(theta), phi, g, scale) + softmax_average(m, g).unsqueeze(1)
    return saturated(y, g.dtype)


def disentangled_weights(pairs: Tensor, m: Tensor, scale: float) -> Tensor:
    """
    The weights of :func:`disentangled_pairwise`, (B, N_q, N_k), from the products of the
    :func:`whitened` theta with phi. They sum to 2 over the keys.
    """
    return softmax_weights(pairs, scale) + m.softmax(1).unsqueeze(1)


def whitened(theta: Tensor) -> Tensor:
    """theta (B, N_q, d) less its mean over the queries."""
    whole = accumulable(theta)
    return (whole - whole.mean(1, keepdim=True)).to(theta.dtype)


class PairwiseFunction(NamedTuple):
    """
    A pairwise function: how y and the weights f / C are computed, and what holds for all weights.

    Attributes:
        average: y, of what is compared (theta and phi, or what is made of them), g and, if
            ``is_scaled``, what multiplies the logits.
        weights: f / C of all pairs (B, N_q, N_k), for few queries or keys: of theta_i^T phi_j, of
            the concatenation a_i + b_j; m, if there is one; what multiplies the logits.
        has_embeddings: f is a function of theta and phi, and not of x itself.
        is_scaled: f has logits that can be scaled.
        weight_sum: what the weights of a query, all positive, sum to; None if they have any sum.
        is_signed: weights may be negative.
    """

    average: Callable[..., Tensor]
    weights: Callable[..., Tensor]
    has_embeddings: bool = True
    is_scaled: bool = True
    weight_sum: float | None = None
    is_signed: bool = False


PAIRWISE = {
    "gaussian": PairwiseFunction(
        softmax_pairwise, softmax_weights, has_embeddings=False, weight_sum=1.0
    ),
    "embedded_gaussian": PairwiseFunction(softmax_pairwise, softmax_weights, weight_sum=1.0),
    "dot_product": PairwiseFunction(
        dot_product_pairwise, dot_product_weights, is_scaled=False, is_signed=True
    ),
    "concatenation": PairwiseFunction(
        concatenation_pairwise, concatenation_weights, is_scaled=False
    ),
    "disentangled": PairwiseFunction(disentangled_pairwise, disentangled_weights, weight_sum=2.0),
}
"""The pairwise functions by the names that they have here: those of Section 3.2, and DNL's."""

ATTENTION = {
    **PAIRWISE,
    "global_context": PairwiseFunction(
        softmax_average,
        partial(torch.softmax, dim=1),
        has_embeddings=False,
        is_scaled=False,
        weight_sum=1.0,
    ),
}
"""What the weights of a block may be: :data:`PAIRWISE`, or the same ones for every query."""
