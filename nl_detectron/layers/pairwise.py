"""
The non-local operation of "Non-local Neural Networks" (https://arxiv.org/abs/1711.07971, Eq. 1),

    y_i = 1 / C(x) * sum_j f(x_i, x_j) g(x_j),

for the four pairwise functions f of Section 3.2, on tensors whose positions are already flattened.
All are exact, and none of them holds a tensor with an entry for every pair (i, j) of a large input:

=================== ============================== ======= ======================================
pairwise function   f(x_i, x_j)                    C(x)    cost (N positions, d = c channels)
=================== ============================== ======= ======================================
(embedded) Gaussian exp(scale * theta_i^T phi_j)   sum f   O(N^2 d) time, O(N d) memory
dot product         theta_i^T phi_j                N_k     O(min(N^2 d, N d^2)) time
concatenation       ReLU(a_i + b_j)                N_k     O(N log N + N d) time
=================== ============================== ======= ======================================

Shapes, here and below: B is the batch, N_q the number of positions y is computed at (the queries),
N_k the number of positions that are summed over (the keys; fewer than N_q when they are
subsampled), d the channels of theta and phi, c those of g. B and N_q may be 0.

Half precision inputs are accumulated in float32. The softmax kinds return the dtype of ``g``: their
y is an average of g, so it fits. The 1 / N_k kinds return float32 for float16 inputs: their y is a
product of three embeddings and may well not fit.

Gradients are exact; gradients of gradients there are none, but for the dot product.

What is recorded to be run elsewhere (TorchScript, torch.export, torch.compile, ONNX) is made of
PyTorch's own operators only, in a form that holds for every input size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Queries are taken this many at a time, and fewer when a block of logits (B, queries, N_k) would
# exceed the number of elements below (16 MiB in float32).
_MAX_QUERIES_PER_BLOCK = 512
_MAX_LOGITS_PER_BLOCK = 2**22
# Products are summed over at most so many positions at a time.
_MAX_SUMMED = 4096
# Up to so many pairs in a batch (128 MiB in float32; all of res4 of an 800 x 1344 image), training
# keeps the softmax for the backward pass, which is faster than computing it again.
_MAX_PAIRS_KEPT = 2**25

# PyTorch 2.1 has it under a private name only.
_is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling


def softmax_pairwise(theta: Tensor, phi: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    """
    The operation with f = exp(scale * theta_i^T phi_j): Gaussian (theta = phi = x, Eq. 2) and
    embedded Gaussian (Eq. 3). f / C is a softmax over j.

    Args:
        theta: (B, N_q, d), floating point.
        phi: (B, N_k, d), same dtype.
        g: (B, N_k, c), same dtype.
        scale: multiplies the logits; 1 is the paper's equation, d ** -0.5 its released code.

    Returns:
        (B, N_q, c), dtype of g.
    """
    if not torch.jit.is_scripting() and not (theta.is_cuda or is_recorded()):
        return _blockwise_softmax(theta, phi, g, scale)
    return _fused_softmax(theta, phi, g, scale)


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
    output_dtype = _sum_dtype(theta.dtype)
    if torch.jit.is_scripting():
        y = _triple_product(accumulable(theta), accumulable(phi), accumulable(g))
    else:
        with no_autocast(theta):
            y = _triple_product(accumulable(theta), accumulable(phi), accumulable(g))
    return y.to(output_dtype)


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
    output_dtype = _sum_dtype(g.dtype)
    if torch.jit.is_scripting():
        y = _sums_over_active(accumulable(a), accumulable(b), accumulable(g))[1]
    else:
        with no_autocast(g):
            y = _ramp_sum(accumulable(a), accumulable(b), accumulable(g))
    return (y / b.shape[1]).to(output_dtype)


def accumulable(x: Tensor) -> Tensor:
    """x, in float32 if it is of half precision."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from lowering the precision again of what is computed from x."""
    # Shapes are all that the meta device computes; it has no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def is_recorded() -> bool:
    """Is a tracer, an exporter or a compiler writing down the operators that are called?"""
    return torch.jit.is_tracing() or _is_compiling()


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a product of three embeddings: bfloat16 has the range for it, float16 not."""
    return torch.float32 if dtype == torch.float16 else dtype


def _triple_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    queries, d = theta.shape[1], theta.shape[2]
    keys, c = g.shape[1], g.shape[2]
    # A recording is for other sizes too.
    if not torch.jit.is_scripting() and not is_recorded():
        pairs_first, channels_first = queries * keys * (d + c), (queries + keys) * d * c
        if pairs_first < channels_first:
            return (theta @ phi.mT / keys) @ g
        context = _sum_of_products(phi.mT, g / keys)
        # In chunks for the sake of the backward pass, which sums over the queries.
        return torch.cat([part @ context for part in theta.split(_MAX_SUMMED, 1)], 1)
    return theta @ (phi.transpose(1, 2) @ (g / keys))


def _fused_softmax(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """
    By PyTorch's own kernel, which without a word makes all N_q x N_k weights if d differs from c.
    """
    width = max(theta.shape[2], g.shape[2])
    if theta.is_cuda:
        width += -width % 8  # the kernels that hold no N_q x N_k weights read 16 bytes at a time
    keys, values = accumulable(phi), accumulable(g)
    # See _BlockwiseSoftmax.
    mean = values.mean(1, keepdim=True)
    y = functional.scaled_dot_product_attention(
        _widened(theta.to(g.dtype), width),
        _widened((keys - keys.mean(1, keepdim=True)).to(g.dtype), width),
        _widened((values - mean).to(g.dtype), width),
        scale=scale,
    )
    return (y.squeeze(1)[:, :, : g.shape[2]] + mean).to(g.dtype)


def _widened(x: Tensor, width: int) -> Tensor:
    """(B, N, d) as one attention head (B, 1, N, width), the new channels zero."""
    x = x.unsqueeze(1)
    return x if x.shape[3] == width else functional.pad(x, (0, width - x.shape[3]))


def _blockwise_softmax(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    pairs = theta.shape[0] * theta.shape[1] * phi.shape[1]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (theta, phi, g))
    return _BlockwiseSoftmax.apply(theta, phi, g, scale, learns and pairs <= _MAX_PAIRS_KEPT)


class _BlockwiseSoftmax(torch.autograd.Function):
    """
    softmax(scale * theta phi^T) g, a block of queries at a time. The backward pass computes the
    softmax again, unless it is small enough to be kept, so that both passes need memory linear in
    N_q + N_k.

    phi and g are centred first. The softmax does not see a constant in phi, and one in g passes
    through it, but in float32 both would cost digits, above all in the gradients, whose sums over
    the keys cancel. For the same reason the weights are divided by their sum once more: PyTorch's
    softmax adds up float32 in a row, and that of 70,000 keys is off by 1e-5.
    """

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, phi: Tensor, g: Tensor, scale: float, keep: bool
    ) -> Tensor:
        with no_autocast(theta):
            keys, _ = _centred(phi)
            values, mean = _centred(g)
            y = values.new_empty(*theta.shape[:2], g.shape[2])
            total = values.new_empty(*theta.shape[:2], 1)
            kept = keys.new_empty(*theta.shape[:2], phi.shape[1]) if keep else None
            for block, weights in _query_blocks(theta, keys, kept):
                _softmax(theta[:, block], keys, scale, out=weights)
                total[:, block] = weights.sum(2, keepdim=True)  # pairwise, hence exact enough
                y[:, block] = _sum_of_products(weights, values).div_(total[:, block])
        ctx.save_for_backward(theta, phi, g, y, total, kept)
        ctx.scale = scale
        return (y + mean).to(g.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        theta, phi, g, y, total, kept = ctx.saved_tensors
        with no_autocast(theta):
            keys, values = _centred(phi)[0], _centred(g)[0]
            grad_theta = torch.empty_like(theta)
            grad_phi, grad_g = torch.zeros_like(keys), torch.zeros_like(values)
            buffers = zip(_query_blocks(theta, keys, kept), _query_blocks(theta, keys))
            for (block, weights), (_, grad_logits) in buffers:
                if kept is None:
                    _softmax(theta[:, block], keys, ctx.scale, out=weights)
                grad = accumulable(grad_y[:, block]) / total[:, block]
                grad_g.baddbmm_(weights.mT, grad)
                # The softmax's Jacobian: dlogits = weights * (dweights - sum_j weights dweights),
                # and that sum is y . dy.
                torch.bmm(grad, values.mT, out=grad_logits)
                grad_logits.sub_((grad * y[:, block]).sum(2, keepdim=True)).mul_(weights)
                grad_theta[:, block] = _sum_of_products(grad_logits, keys) * ctx.scale
                grad_phi.baddbmm_(grad_logits.mT, accumulable(theta[:, block]), alpha=ctx.scale)
        return grad_theta, grad_phi.to(phi.dtype), grad_g.to(g.dtype), None, None


def _sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """
    x (B, n, N) times y (B, N, m), a part of N at a time: for few channels the kernels of libraries
    add up float32 in a row.
    """
    parts = zip(x.split(_MAX_SUMMED, 2), y.split(_MAX_SUMMED, 1))
    return reduce(torch.add, (x_part @ y_part for x_part, y_part in parts))


def _softmax(theta: Tensor, keys: Tensor, scale: float, *, out: Tensor) -> None:
    torch.bmm(accumulable(theta) * scale, keys.mT, out=out)
    torch.softmax(out, 2, out=out)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """x less its mean over the positions, and that mean."""
    x = accumulable(x)
    mean = x.mean(1, keepdim=True)
    return x - mean, mean


def _query_blocks(
    theta: Tensor, keys: Tensor, whole: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """
    Blocks of queries, each with memory for its (B, queries, N_k) logits: its part of ``whole``
    (B, N_q, N_k), or the same memory for every block.
    """
    (batch, queries), count = theta.shape[:2], keys.shape[1]
    size = _MAX_LOGITS_PER_BLOCK // max(1, batch * count)
    size = min(max(size, 1), _MAX_QUERIES_PER_BLOCK, queries)
    buffer = keys.new_empty(batch, size, count) if whole is None else whole
    for start in range(0, queries, max(size, 1)):
        stop = min(start + size, queries)
        block = slice(start, stop)
        yield block, buffer[:, : stop - start] if whole is None else buffer[:, block]


def _ramp_sum(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
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
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        a, b, g = ctx.saved_tensors
        grad_a = (_sums_over_active(a, b, g)[0] * grad_y).sum(2)
        step_sum, grad_g = _sums_over_active(b, a, grad_y)
        return grad_a, (step_sum * g).sum(2), grad_g


def _sums_over_active(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j g_j and sum_j (a_i + b_j) g_j over the j with a_i + b_j > 0; (B, N_a, c) each."""
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
