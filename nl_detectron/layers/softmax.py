"""softmax(scale * theta phi^T) g without holding a weight for every pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nl_detectron.layers.first_order import first_order
from nl_detectron.layers.numerics import accumulable, is_half, no_autocast, sum_of_products
from nl_detectron.layers.recorded import is_recorded
from nl_detectron.layers.subsampling import average_pool

TILES, SDPA = "tiles", "sdpa"

# On the CPU, queries are taken this many at a time, and fewer when a tile of logits (B, queries,
# N_k) would exceed the number of elements below (16 MiB in float32).
_MAX_QUERIES_PER_TILE = 512
_MAX_PAIRS_PER_TILE = 2**22
# Up to so many pairs in a batch (128 MiB in float32; all of res4 of an 800 x 1344 image), training
# keeps the softmax for the backward pass, which is faster than computing it again.
_MAX_PAIRS_KEPT = 2**25
_GROUPS = 16


class SoftmaxPlan(NamedTuple):
    """
    How a softmax over all keys is computed.

    Attributes:
        algorithm: ``TILES``, float32 products for a tile of queries and all keys at a time; or
            ``SDPA``, PyTorch's ``scaled_dot_product_attention``. The rest is for tiles.
        max_queries: in a tile.
        max_pairs: of queries and keys in a tile, in all of the batch.
        keep: for the backward pass, the weights of all pairs, rather than to compute them again.
    """

    algorithm: str
    max_queries: int = 2**30
    max_pairs: int = 2**62
    keep: bool = False


def choose(device: torch.device, batch: int, queries: int, keys: int, learns: bool) -> SoftmaxPlan:
    """
    Decide, here and nowhere else, how a softmax is computed:

    ======== ====================================== ===========================================
    device   shape                                  plan
    ======== ====================================== ===========================================
    recorded all: it will run for other ones        ``SDPA``
    CUDA     all; not measured yet (docs/GPU.md)    ``SDPA``
    others   up to ``_MAX_PAIRS_KEPT`` pairs        tiles, whose weights are kept in training
    others   more                                   tiles
    ======== ====================================== ===========================================
    """
    if is_recorded() or device.type == "cuda":
        return SoftmaxPlan(SDPA)
    keep = learns and batch * queries * keys <= _MAX_PAIRS_KEPT
    return SoftmaxPlan(TILES, _MAX_QUERIES_PER_TILE, _MAX_PAIRS_PER_TILE, keep)


def softmax_pairwise(
    theta: Tensor, phi: Tensor, g: Tensor, scale: float = 1.0, plan: SoftmaxPlan | None = None
) -> Tensor:
    """
    The operation with f = exp(scale * theta_i^T phi_j): Gaussian (theta = phi = x, Eq. 2) and
    embedded Gaussian (Eq. 3). f / C is a softmax over j.

    Args:
        theta: (B, N_q, d), floating point.
        phi: (B, N_k, d), same dtype.
        g: (B, N_k, c), same dtype.
        scale: multiplies the logits; 1 is the paper's equation, d ** -0.5 its released code.
        plan: how it is computed; None for what is best.

    Returns:
        (B, N_q, c), dtype of g.
    """
    if plan is None:
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (theta, phi, g))
        plan = choose(theta.device, theta.shape[0], theta.shape[1], phi.shape[1], learns)
    if plan.algorithm == SDPA:
        return _fused_softmax(theta, phi, g, scale)
    return _TiledSoftmax.apply(theta, phi, g, scale, plan)


def softmax_weights(pairs: Tensor, scale: float = 1.0) -> Tensor:
    """The weights f / C of :func:`softmax_pairwise` from all theta_i^T phi_j, (B, N_q, N_k)."""
    return (scale * pairs).softmax(2)


def _fused_softmax(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """
    PyTorch's ``scaled_dot_product_attention``. Where d differs from c, that would make all
    N_q x N_k weights; theta, phi and g are widened to the same width.
    """
    width = max(theta.shape[2], g.shape[2])
    if theta.is_cuda:
        width += -width % 8  # the kernels that hold no N_q x N_k weights read 16 bytes at a time
    (keys, _), (values, common) = centred(phi.to(g.dtype)), centred(g)
    y = functional.scaled_dot_product_attention(
        _widened(theta.to(g.dtype), width),
        _widened(keys, width),
        _widened(values, width),
        scale=scale,
    )
    return (y.squeeze(1)[:, :, : g.shape[2]] + common).to(g.dtype)


def _widened(x: Tensor, width: int) -> Tensor:
    """
    (B, N, d) as one attention head (B, 1, N, width), the new channels zero. The channels of a
    position lie side by side: else PyTorch would take the kernel that holds N_q x N_k weights.
    """
    x = x.unsqueeze(1).contiguous()
    return x if x.shape[3] == width else functional.pad(x, (0, width - x.shape[3]))


class _TiledSoftmax(torch.autograd.Function):
    """
    A tile of queries at a time, in float32 or better. The backward pass computes the softmax again
    where ``plan`` does not keep it: then both passes need memory linear in N_q + N_k.

    The weights are divided by their sum once more: PyTorch's softmax adds up float32 in a row, and
    that of 70,000 keys is off by 1e-5.
    """

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, phi: Tensor, g: Tensor, scale: float, plan: SoftmaxPlan
    ) -> Tensor:
        with no_autocast(theta):
            (keys, _), (values, common) = centred(accumulable(phi)), centred(accumulable(g))
            y = values.new_empty(*theta.shape[:2], g.shape[2])
            total = values.new_empty(*theta.shape[:2], 1)
            whole = (*theta.shape[:2], phi.shape[1])
            kept = values.new_empty(whole) if plan.keep else None
            for tile, weights in _tiles(theta, keys, plan, kept):
                _softmax(accumulable(theta[:, tile]) * scale, keys, out=weights)
                total[:, tile] = weights.sum(2, keepdim=True)  # pairwise, hence exact enough
                sum_of_products(weights, values, out=y[:, tile]).div_(total[:, tile])
        y.add_(common)
        ctx.save_for_backward(theta, keys, values, common, y, total, kept)
        ctx.scale, ctx.plan, ctx.dtypes = scale, plan, (theta.dtype, phi.dtype, g.dtype)
        return y.to(g.dtype)  # of float32 what is kept itself

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        theta, keys, values, common, y, total, kept = ctx.saved_tensors
        grad_theta = torch.empty_like(theta, dtype=keys.dtype)
        grad_phi, grad_g = torch.zeros_like(keys), torch.zeros_like(values)
        with no_autocast(theta):
            buffers = zip(_tiles(theta, keys, ctx.plan, kept), _tiles(theta, keys, ctx.plan))
            for (tile, weights), (_, grad_logits) in buffers:
                queries = accumulable(theta[:, tile]) * ctx.scale
                if kept is None:
                    _softmax(queries, keys, out=weights)
                grad = accumulable(grad_y[:, tile]) / total[:, tile]
                grad_g.baddbmm_(weights.mT, grad)
                # The softmax's Jacobian: dlogits = weights * (dweights - sum_j weights dweights),
                # and that sum is y . dy.
                torch.bmm(grad, values.mT, out=grad_logits)
                grad_logits.sub_((grad * (y[:, tile] - common)).sum(2, keepdim=True)).mul_(weights)
                sum_of_products(grad_logits, keys, out=grad_theta[:, tile]).mul_(ctx.scale)
                grad_phi.baddbmm_(grad_logits.mT, queries)
        gradients = zip((grad_theta, grad_phi, grad_g), ctx.dtypes)
        return *(gradient.to(dtype) for gradient, dtype in gradients), None, None


def _softmax(theta: Tensor, keys: Tensor, *, out: Tensor) -> None:
    torch.bmm(theta, keys.mT, out=out)
    torch.softmax(out, 2, out=out)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """
    x less what the keys have in common, and that (B, 1, channels): what lies between 0 and each of
    the means of 16 groups of keys. The softmax does not see a constant in phi, and one in g passes
    through it, but both would cost digits, above all in the gradients, whose sums over the keys
    cancel. The mean of all would be that of an outlier, and cost more digits than it saves. Half
    precision stays as it is: differences would be rounded, those of like numbers all to the same
    side, which no average takes away.
    """
    if is_half(x):
        return x, torch.zeros_like(x[:, :1], dtype=torch.float32)
    means = average_pool(x.detach().transpose(1, 2).unsqueeze(2), 1, _GROUPS)
    common = means.amin(3).clamp(min=0) + means.amax(3).clamp(max=0)
    common = common.transpose(1, 2)
    return x - common, common


def _tiles(
    theta: Tensor, keys: Tensor, plan: SoftmaxPlan, whole: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """
    Tiles of queries, each with memory for its (B, queries, N_k) logits: its part of ``whole``
    (B, N_q, N_k), or the same memory for every tile.
    """
    (batch, queries), count = theta.shape[:2], keys.shape[1]
    size = plan.max_pairs // max(1, batch * count)
    size = min(max(size, 1), plan.max_queries, queries)
    buffer = keys.new_empty(batch, size, count) if whole is None else whole
    for start in range(0, queries, max(size, 1)):
        stop = min(start + size, queries)
        tile = slice(start, stop)
        yield tile, buffer[:, : stop - start] if whole is None else buffer[:, tile]
