"""W_z y without theta or y, where what their matrices do is cheaper done to something smaller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nl_detectron.layers.children import Affine, weight_and_bias
from nl_detectron.layers.numerics import accumulable, no_autocast
from nl_detectron.layers.pairwise import (
    PairwiseFunction,
    dot_product_context,
    products_of_queries,
    sum_dtype,
    whitened,
)
from nl_detectron.layers.recorded import is_compiling
from nl_detectron.layers.softmax import centred
from nl_detectron.layers.subsampling import Pool

KEYS, CONTEXT = "keys", "context"


def choose_fold(
    function: PairwiseFunction, x: Tensor, g: Tensor, has_fixed_keys: bool
) -> str | None:
    """
    Decide, here and nowhere else, where the matrices of theta and W_z go, from x (B, C, N_q), g
    (B, c, N_k), and whether N_k is the same for every size of the input:

    ================================= ==========================================================
    where                             fold
    ================================= ==========================================================
    N_k (c C + N_q e) < N_q c C,      ``KEYS``: theta's into phi and W_z into g. e is what a pair
    and N_k <= C                      then costs more: C, of those that visit all pairs C - c
    otherwise, dot product, C < N_q   ``CONTEXT``: W_z into phi^T g
    otherwise                         None
    compiled, for inputs of all sizes the same, for N_q without end; None unless N_k is fixed
    ================================= ==========================================================
    """
    is_dot_product = not function.is_scaled and function.is_signed
    channels, inner = x.shape[1], g.shape[1]
    extra = channels - inner if function.is_scaled else channels
    if is_compiling():
        if has_fixed_keys and g.shape[2] * extra < inner * channels and g.shape[2] <= channels:
            return KEYS
        return CONTEXT if is_dot_product else None
    queries, keys, saved = int(x.shape[2]), int(g.shape[2]), inner * channels
    if keys <= channels and keys * (saved + queries * extra) < queries * saved:
        return KEYS
    return CONTEXT if is_dot_product and channels < queries else None


def linear_term(child: nn.Module, x: Tensor, w: Tensor, pool: Pool, is_plain: bool) -> Tensor:
    """w^T pool(child(x)), (B, N), of w (d, 1); from x itself if child is plain and not pooled."""
    shift = w.new_zeros(1)
    is_linear = is_plain and isinstance(pool, nn.Identity)
    positions = accumulable((x if is_linear else pool(child(x))).flatten(2))
    with no_autocast(x):
        if is_linear:
            matrix, bias = weight_and_bias(child, w)
            w, shift = matrix @ w, bias.unsqueeze(0) @ w
        return torch.bmm(w.t().expand(x.shape[0], -1, -1), positions).squeeze(1) + shift


def sum_by_context(embedded: Sequence[Tensor], g: Tensor, out: Affine) -> Tensor:
    """W_z y of the dot product, (B, C, N_q), from theta (B, N_q, d), phi (B, N_k, d) and g."""
    theta, phi = embedded
    context = dot_product_context(accumulable(phi), accumulable(g)) @ out.matrix
    z = products_of_queries(accumulable(theta), context) + out.bias.unsqueeze(1)
    return z.to(sum_dtype(g.dtype))


def sum_over_keys(
    function: PairwiseFunction,
    x: Tensor,
    embedded: Sequence[Tensor],
    g: Tensor,
    theta: Affine | None,
    out: Affine,
    factors: Sequence[float],
) -> Tensor:
    """
    W_z y from few keys: theta_i^T phi_j = x_i^T (W_theta^T phi_j) + b_theta^T phi_j, and W_z goes
    into g. The weights of all pairs take no more memory than x.

    Args:
        function: the pairwise function.
        x: (B, C, N_q), in the dtype of g.
        embedded: phi (B, N_k, d), of "disentangled" m (B, N_k), too; of the concatenation a and b.
        g: (B, N_k, c).
        theta: W_theta^T and its bias; None of the functions without.
        out: W_z^T and its bias.
        factors: what the function's weights take besides.

    Returns:
        (B, C, N_q), contiguous.
    """
    if function.weight_sum is None:
        values, shift = g @ out.matrix, out.bias.unsqueeze(0)
    else:
        g, common = centred(g)
        values = g @ out.matrix
        shift = function.weight_sum * (common.to(g.dtype) @ out.matrix).squeeze(1) + out.bias
    first, *rest = embedded
    if first.dim() == 2:
        pairs, rest = first.unsqueeze(2) + rest[0].unsqueeze(1), []
    else:
        phi = first if function.weight_sum is None else centred(first)[0]
        keys = phi if theta is None else phi @ theta.matrix.t()
        queries = whitened(x.transpose(1, 2)) if rest else x.transpose(1, 2)
        pairs = torch.bmm(queries, keys.to(x.dtype).transpose(1, 2))
        if theta is not None:
            # Whitening takes the bias off, too, whose gradient is then zero, not None.
            bias = theta.bias - theta.bias if rest else theta.bias
            pairs = pairs + (phi @ bias.unsqueeze(1)).transpose(1, 2)
    weights = function.weights(accumulable(pairs), *map(accumulable, rest), *factors)
    z = torch.bmm(values.transpose(1, 2), weights.to(values.dtype).transpose(1, 2))
    return z + shift.unsqueeze(2)
