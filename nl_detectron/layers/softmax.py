"""softmax(scale * theta phi^T) g without holding a weight for every pair, and softmax(m) g."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from nl_detectron.layers.numerics import MAX_SUMMED, accumulable, no_autocast, sum_of_products

# Queries are taken this many at a time, and fewer when a block of logits (B, queries, N_k) would
# exceed the number of elements below (16 MiB in float32).
_MAX_QUERIES_PER_BLOCK = 512
_MAX_LOGITS_PER_BLOCK = 2**22
# Up to so many pairs in a batch (128 MiB in float32; all of res4 of an 800 x 1344 image), training
# keeps the softmax for the backward pass, which is faster than computing it again.
_MAX_PAIRS_KEPT = 2**25


def fused_softmax(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """
    softmax(scale * theta phi^T) g by PyTorch's ``scaled_dot_product_attention``. Where d differs
    from c, that would make all N_q x N_k weights; theta, phi and g are widened to the same width.

    Args:
        theta: (B, N_q, d), floating point.
        phi: (B, N_k, d), same dtype.
        g: (B, N_k, c), same dtype.
        scale: multiplies the logits.

    Returns:
        (B, N_q, c), dtype of g.
    """
    width = max(theta.shape[2], g.shape[2])
    if theta.is_cuda:
        width += -width % 8  # the kernels that hold no N_q x N_k weights read 16 bytes at a time
    (keys, _), (values, mean) = _centred(phi), _centred(g)  # see _BlockwiseSoftmax
    y = functional.scaled_dot_product_attention(
        _widened(theta.to(g.dtype), width),
        _widened(keys.to(g.dtype), width),
        _widened(values.to(g.dtype), width),
        scale=scale,
    )
    return (y.squeeze(1)[:, :, : g.shape[2]] + mean).to(g.dtype)


def _widened(x: Tensor, width: int) -> Tensor:
    """(B, N, d) as one attention head (B, 1, N, width), the new channels zero."""
    x = x.unsqueeze(1)
    return x if x.shape[3] == width else functional.pad(x, (0, width - x.shape[3]))


def blockwise_softmax(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """
    softmax(scale * theta phi^T) g, some of the queries at a time; see :class:`_BlockwiseSoftmax`.

    Args:
        theta: (B, N_q, d), floating point.
        phi: (B, N_k, d), same dtype.
        g: (B, N_k, c), same dtype.
        scale: multiplies the logits.

    Returns:
        (B, N_q, c), dtype of g.
    """
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
                sum_of_products(weights, values, out=y[:, block]).div_(total[:, block])
        ctx.save_for_backward(theta, phi, g, y, total, kept)
        ctx.scale = scale
        return (y + mean).to(g.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        theta, phi, g, y, total, kept = ctx.saved_tensors
        with no_autocast(theta):
            keys, values = _centred(phi)[0], _centred(g)[0]
            grad_theta = torch.empty_like(theta, dtype=keys.dtype)
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
                sum_of_products(grad_logits, keys, out=grad_theta[:, block]).mul_(ctx.scale)
                grad_phi.baddbmm_(grad_logits.mT, accumulable(theta[:, block]), alpha=ctx.scale)
        gradients = grad_theta.to(theta.dtype), grad_phi.to(phi.dtype), grad_g.to(g.dtype)
        return *gradients, None, None


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
            weights = weights / weights.sum(1, keepdim=True)  # exact enough, as above
            weights = weights.to(accumulable(g[:0]).dtype)
            parts = zip(weights.split(MAX_SUMMED, 1), g.split(MAX_SUMMED, 1))
            y = sum((part.unsqueeze(1) @ accumulable(values) for part, values in parts))
        ctx.save_for_backward(logits, g, weights, y)
        return y.squeeze(1)

    @staticmethod
    @once_differentiable
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
