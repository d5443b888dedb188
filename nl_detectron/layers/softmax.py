"""softmax(scale * theta phi^T) g without holding a weight for every pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nl_detectron.layers.first_order import first_order
from nl_detectron.layers.numerics import (
    accumulable,
    no_autocast,
    product,
    sum_of_products,
)

TILES, SDPA = "tiles", "sdpa"

# On the CPU, queries are taken this many at a time, and fewer when a tile of logits (B, queries,
# N_k) would exceed the number of elements below (16 MiB in float32).
_MAX_QUERIES_PER_TILE = 512
_MAX_PAIRS_PER_TILE = 2**22
# Up to so many pairs in a batch (128 MiB in float32; all of res4 of an 800 x 1344 image), training
# keeps the softmax for the backward pass, which is faster than computing it again.
_MAX_PAIRS_KEPT = 2**25
# What is rounded to float16 is brought to this maximum: 28 powers of 2 below it keep all digits.
_MAX_ROUNDED, _MIN_LARGEST = 2.0**14, 2.0**-100


class Plan(NamedTuple):
    """
    How a softmax over all keys is computed.

    Attributes:
        algorithm: ``TILES``, products of matrices for a tile of queries and all keys at a time; or
            ``SDPA``, PyTorch's ``scaled_dot_product_attention``. The rest is for tiles.
        max_queries: in a tile.
        max_pairs: of queries and keys in a tile, in all of the batch.
        keep: for the backward pass, the weights of all pairs, rather than to compute them again.
        half: of half precision inputs, multiply half precision matrices; otherwise float32 ones.
            Products are summed in float32, and the softmax is float32, in any case.
    """

    algorithm: str
    max_queries: int = 2**30
    max_pairs: int = 2**62
    keep: bool = False
    half: bool = True


CANDIDATES = {
    "tiles of 4M pairs": Plan(TILES, max_pairs=2**22),
    "tiles of 16M pairs": Plan(TILES, max_pairs=2**24),
    "tiles of 64M pairs": Plan(TILES, max_pairs=2**26),
    "dense": Plan(TILES, keep=True),
    "sdpa": Plan(SDPA),
}
"""What :func:`choose` may choose from on CUDA; ``make gpu-check`` measures all of them."""


def choose(device: torch.device, batch: int, queries: int, keys: int, learns: bool) -> Plan:
    """
    The one place where it is decided how a softmax is computed:

    ====== ======================================== ===========================================
    device shape                                    plan
    ====== ======================================== ===========================================
    CUDA   all; not measured yet (docs/GPU.md)      ``SDPA``
    others up to ``_MAX_PAIRS_KEPT`` pairs          tiles, whose weights are kept in training
    others more                                     tiles
    ====== ======================================== ===========================================

    Args:
        device: where it is computed.
        batch: B.
        queries: N_q.
        keys: N_k.
        learns: gradients will be asked for.

    Returns:
        The plan.
    """
    if device.type == "cuda":
        return CANDIDATES["sdpa"]
    keep = learns and batch * queries * keys <= _MAX_PAIRS_KEPT
    return Plan(TILES, _MAX_QUERIES_PER_TILE, _MAX_PAIRS_PER_TILE, keep, half=False)


def attend(theta: Tensor, phi: Tensor, g: Tensor, scale: float, plan: Plan | None = None) -> Tensor:
    """
    softmax(scale * theta phi^T) g.

    Args:
        theta: (B, N_q, d), floating point.
        phi: (B, N_k, d), same dtype.
        g: (B, N_k, c), same dtype.
        scale: multiplies the logits.
        plan: how; None for what :func:`choose` says.

    Returns:
        (B, N_q, c), dtype of g.
    """
    if plan is None:
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (theta, phi, g))
        batch, queries, keys = theta.shape[0], theta.shape[1], phi.shape[1]
        plan = choose(theta.device, batch, queries, keys, learns)
    if plan.algorithm == SDPA:
        return fused_softmax(theta, phi, g, scale)
    return _TiledSoftmax.apply(theta, phi, g, scale, plan)


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
    (keys, _), (values, mean) = _centred(phi.to(g.dtype)), _centred(g)  # see _TiledSoftmax
    y = functional.scaled_dot_product_attention(
        _widened(theta.to(g.dtype), width),
        _widened(keys, width),
        _widened(values, width),
        scale=scale,
    )
    return (y.squeeze(1)[:, :, : g.shape[2]] + mean).to(g.dtype)


def _widened(x: Tensor, width: int) -> Tensor:
    """
    (B, N, d) as one attention head (B, 1, N, width), the new channels zero. The channels of a
    position lie side by side: else PyTorch would take the kernel that holds N_q x N_k weights.
    """
    x = x.unsqueeze(1).contiguous()
    return x if x.shape[3] == width else functional.pad(x, (0, width - x.shape[3]))


class _TiledSoftmax(torch.autograd.Function):
    """
    softmax(scale * theta phi^T) g, a tile of queries at a time. The backward pass computes the
    softmax again, unless it is small enough to be kept, so that both passes need memory linear in
    N_q + N_k.

    float32 phi and g are centred first. The softmax does not see a constant in phi, and one in g
    passes through it, but both would cost digits, above all in the gradients, whose sums over the
    keys cancel. For the same reason the weights are divided by their sum once more: PyTorch's
    softmax adds up float32 in a row, and that of 70,000 keys is off by 1e-5.
    """

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, phi: Tensor, g: Tensor, scale: float, plan: Plan
    ) -> Tensor:
        with no_autocast(theta):
            keys, values, mean = _operands(phi, g, plan)
            y = mean.new_empty(*theta.shape[:2], g.shape[2])
            total = mean.new_empty(*theta.shape[:2], 1)
            whole = (*theta.shape[:2], phi.shape[1])
            kept = mean.new_empty(whole) if plan.keep else None
            for tile, weights in _tiles(theta, keys, plan, kept):
                _softmax(_scaled(theta[:, tile], scale, keys), keys, out=weights)
                total[:, tile] = weights.sum(2, keepdim=True)  # pairwise, hence exact enough
                rounded, size = _rounded(weights, keys.dtype, 1.0)
                part = sum_of_products(rounded, values, out=y[:, tile])
                part.div_(total[:, tile] / size)
        y.add_(mean)
        ctx.save_for_backward(theta, phi, g, y, total, kept)
        ctx.scale, ctx.plan = scale, plan
        return y.to(g.dtype)  # of float32 what is kept itself

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        theta, phi, g, y, total, kept = ctx.saved_tensors
        with no_autocast(theta):
            keys, values, mean = _operands(phi, g, ctx.plan)
            grad_theta = torch.empty_like(theta, dtype=mean.dtype)
            grad_phi = torch.zeros_like(phi, dtype=mean.dtype)
            grad_g = torch.zeros_like(g, dtype=mean.dtype)
            buffers = zip(_tiles(theta, keys, ctx.plan, kept), _tiles(theta, keys, ctx.plan))
            for (tile, weights), (_, grad_logits) in buffers:
                queries = _scaled(theta[:, tile], ctx.scale, keys)
                if kept is None:
                    _softmax(queries, keys, out=weights)
                grad = accumulable(grad_y[:, tile]) / total[:, tile]
                dot = (grad * (y[:, tile] - mean)).sum(2, keepdim=True)
                grad = grad.to(keys.dtype)
                rounded, size = _rounded(weights, keys.dtype, 1.0)
                _add_product(grad_g, rounded.mT, grad, size)
                # The softmax's Jacobian: dlogits = weights * (dweights - sum_j weights dweights),
                # and that sum is y . dy.
                product(grad, values.mT, out=grad_logits)
                grad_logits.sub_(dot).mul_(weights)
                rounded, size = _rounded(grad_logits, keys.dtype)
                part = sum_of_products(rounded, keys, out=grad_theta[:, tile])
                part.mul_(ctx.scale * size)
                _add_product(grad_phi, rounded.mT, queries, size)
        gradients = grad_theta.to(theta.dtype), grad_phi.to(phi.dtype), grad_g.to(g.dtype)
        return *gradients, None, None


def _operands(phi: Tensor, g: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """phi and g as they are multiplied, and what to add to the average, in full precision."""
    g = g if plan.half else accumulable(g)
    phi = phi.to(g.dtype)  # autocast leaves the plain Gaussian's x in float32
    (keys, _), (values, mean) = _centred(phi), _centred(g)
    return keys, values, mean


def _scaled(theta: Tensor, scale: float, keys: Tensor) -> Tensor:
    return (accumulable(theta) * scale).to(keys.dtype)


def _softmax(theta: Tensor, keys: Tensor, *, out: Tensor) -> None:
    product(theta, keys.mT, out=out)
    torch.softmax(out, 2, out=out)


def _rounded(
    x: Tensor, dtype: torch.dtype, largest: float | None = None
) -> tuple[Tensor, Tensor | float]:
    """
    x in ``dtype``, and what that has to be multiplied by: float16 has few exponents. Nothing in x
    exceeds ``largest``; None if that is to be looked for.
    """
    if dtype != torch.float16:
        return x.to(dtype), 1.0
    size: Tensor | float = _MIN_LARGEST if largest is None else largest
    if largest is None and x.numel():
        size = x.abs().amax((1, 2), keepdim=True).clamp(min=_MIN_LARGEST)
    size = size / _MAX_ROUNDED
    return torch.div(x, size, out=torch.empty_like(x, dtype=dtype)), size


def _add_product(total: Tensor, x: Tensor, y: Tensor, factor: Tensor | float) -> None:
    """total += factor x y."""
    if x.dtype == total.dtype:
        total.baddbmm_(x, y)  # what is not rounded has the factor 1
    else:
        total.add_(product(x, y) * factor)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """
    x less its mean over the positions, and that mean. Half precision stays as it is: differences
    would be rounded, those of like numbers all to the same side, which no average takes away.
    """
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x, torch.zeros_like(x[:, :1], dtype=torch.float32)
    mean = x.mean(1, keepdim=True)
    return x - mean, mean


def _tiles(
    theta: Tensor, keys: Tensor, plan: Plan, whole: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """
    Tiles of queries, each with memory for its (B, queries, N_k) logits: its part of ``whole``
    (B, N_q, N_k), or the same memory for every tile.
    """
    (batch, queries), count = theta.shape[:2], keys.shape[1]
    size = plan.max_pairs // max(1, batch * count)
    size = min(max(size, 1), plan.max_queries, queries)
    dtype = accumulable(keys[:0]).dtype
    buffer = keys.new_empty(batch, size, count, dtype=dtype) if whole is None else whole
    for start in range(0, queries, max(size, 1)):
        stop = min(start + size, queries)
        tile = slice(start, stop)
        yield tile, buffer[:, : stop - start] if whole is None else buffer[:, tile]
