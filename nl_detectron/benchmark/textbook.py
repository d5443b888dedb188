"""The non-local block with its N x N matrix, as one writes it down from the paper's equations."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from nl_detectron.layers import NonLocalBlock


def textbook_operation(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    pairwise: str,
    scale: float = 1.0,
    concat_weight: Tensor | None = None,
) -> Tensor:
    """
    y_i = 1 / C(x) * sum_j f(x_i, x_j) g(x_j) (Eq. 1), holding f for all pairs.

    Args:
        theta: (B, N_q, d), floating point.
        phi: (B, N_k, d), same dtype.
        g: (B, N_k, c), same dtype.
        pairwise: the pairwise function, in the words of :class:`NonLocalBlock`.
        scale: multiplies the logits of the two Gaussians.
        concat_weight: (2 d,), the concatenation's w_f; theta's half comes first.

    Returns:
        (B, N_q, c).
    """
    if pairwise == "dot_product":
        return (theta / phi.shape[1]) @ phi.mT @ g
    if concat_weight is not None:
        # w_f^T [theta_i, phi_j], without the 2d x N x N tensor of concatenated embeddings.
        w_theta, w_phi = concat_weight.chunk(2)
        return textbook_concatenation(theta @ w_theta, phi @ w_phi, g)
    return (scale * theta @ phi.mT).softmax(2) @ g


def concat_weight_of(block: NonLocalBlock) -> Tensor | None:
    """(2 d,), or None for a block without concatenation."""
    if block.pairwise != "concatenation":
        return None
    return block.get_parameter("concat.weight").flatten()


def textbook_concatenation(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """y from a_i = w_theta^T theta_i (B, N_q), b_j = w_phi^T phi_j (B, N_k) and g (B, N_k, c)."""
    return (a.unsqueeze(2) + b.unsqueeze(1)).relu() @ (g / b.shape[1])


def embed(block: NonLocalBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """theta (B, N_q, d), phi (B, N_k, d) and g (B, N_k, c) of a block for images (B, C, H, W)."""
    keys = functional.max_pool2d(x, 2) if block.subsample == "input" else x
    theta, phi, g = x, keys, block.g(keys)
    if block.theta is not None and block.phi is not None:
        theta, phi = block.theta(x), block.phi(keys)
    if block.subsample == "embeddings":
        phi, g = functional.max_pool2d(phi, 2), functional.max_pool2d(g, 2)
    return theta.flatten(2).mT, phi.flatten(2).mT, g.flatten(2).mT


class TextbookBlock(nn.Module):
    """A :class:`NonLocalBlock` for images with the operation above: same weights, same result."""

    def __init__(self, block: NonLocalBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        block = self.block
        y = textbook_operation(
            *embed(block, x), block.pairwise, block.logit_scale, concat_weight_of(block)
        )
        z = block.out(y.mT.unflatten(2, x.shape[2:]))
        return x + (z if block.norm is None else block.norm(z))
