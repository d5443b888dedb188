"""The non-local operation and block in float64, written straight from the paper's equations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
PAIRWISE = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
ADAPTIVE_POOL = {
    1: functional.adaptive_avg_pool1d,
    2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d,
}


def weights(
    pairwise: str, theta: Tensor, phi: Tensor, scale: float = 1.0, w_f: Tensor | None = None
) -> Tensor:
    """f(x_i, x_j) / C(x) for all pairs, (B, N_q, N_k), from (B, N_q, d) and (B, N_k, d)."""
    num_keys = phi.shape[1]
    products = torch.einsum("bid,bjd->bij", theta, phi)
    if pairwise in ("gaussian", "embedded_gaussian"):
        # The largest logit is taken off for the exponential to stay finite; it cancels.
        f = torch.exp(scale * products - (scale * products).amax(2, keepdim=True))
        return f / f.sum(2, keepdim=True)
    if pairwise == "dot_product":
        return products / num_keys
    pairs = torch.cat(
        [
            theta.unsqueeze(2).expand(-1, -1, num_keys, -1),
            phi.unsqueeze(1).expand(-1, theta.shape[1], -1, -1),
        ],
        dim=3,
    )
    return torch.relu(pairs @ w_f) / num_keys


def pool(x: Tensor) -> Tensor:
    dims = x.dim() - 2
    kernel = [2 if size > 1 else 1 for size in x.shape[2:]]
    if dims == 3:
        kernel[0] = 1
    return POOL[dims](x, kernel, kernel)


def pyramid(x: Tensor) -> Tensor:
    """(B, C, *grid) to (B, C, bins), or (B, C, T, bins)."""
    dims = x.dim() - 2
    levels = []
    for bins in (1, 3, 6, 8):
        size = (None, bins, bins) if dims == 3 else (bins,) * dims
        levels.append(ADAPTIVE_POOL[dims](x, size).flatten(3 if dims == 3 else 2))
    return torch.cat(levels, -1)


SUBSAMPLE = {"none": lambda x: x, "input": lambda x: x, "embeddings": pool, "pyramid": pyramid}


def block(
    x: Tensor,
    tensors: dict,
    pairwise: str,
    subsample: str,
    scale: bool,
    temperature: float = 0.05,
) -> Tensor:
    """z of a NonLocalBlock without norm, whose state_dict is ``tensors``."""

    def embed(name: str, x: Tensor) -> Tensor:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return CONV[x.dim() - 2](x, weight, bias)

    keys = pool(x) if subsample == "input" else x
    reduce = SUBSAMPLE[subsample]
    g = reduce(embed("g", keys))
    if pairwise == "gaussian":
        theta, phi = x, reduce(keys)
    else:
        theta, phi = embed("theta", x), reduce(embed("phi", keys))
    scale = theta.shape[1] ** -0.5 if scale else 1.0
    theta, phi = theta.flatten(2).transpose(1, 2), phi.flatten(2).transpose(1, 2)
    if pairwise == "disentangled":
        theta, phi = theta - theta.mean(1, keepdim=True), phi - phi.mean(1, keepdim=True)
        m = torch.exp(reduce(embed("unary", keys))).flatten(2)
        f = weights("embedded_gaussian", theta, phi, scale / temperature)
        f = f + m / m.sum(2, keepdim=True)
    else:
        w_f = tensors["concat.weight"].flatten() if pairwise == "concatenation" else None
        f = weights(pairwise, theta, phi, scale, w_f)
    y = torch.einsum("bij,bcj->bci", f, g.flatten(2)).reshape(x.shape[0], -1, *x.shape[2:])
    return x + embed("out", y)


def global_context(x: Tensor, tensors: dict, eps: float = 1e-5) -> Tensor:
    """z of a GlobalContextBlock, whose state_dict is ``tensors``."""

    def conv(name: str, x: Tensor) -> Tensor:
        return CONV[x.dim() - 2](x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    f = torch.exp(conv("context", x)).flatten(2)
    weights = f / f.sum(2, keepdim=True)
    context = (weights * x.flatten(2)).sum(2).reshape(*x.shape[:2], *[1] * (x.dim() - 2))
    t = conv("reduce", context).flatten(1)
    deviation = t - t.mean(1, keepdim=True)
    t = deviation / (deviation.square().mean(1, keepdim=True) + eps).sqrt()
    t = torch.relu(t * tensors["norm.weight"] + tensors["norm.bias"])
    return x + conv("out", t.reshape(*t.shape, *[1] * (x.dim() - 2)))
