"""What is computed, and who computes it. A new implementation is an entry in the table below."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

from nl_detectron.conversion import convert
from nl_detectron.layers import (
    PAIRWISE,
    SUBSAMPLE,
    NonLocalBlock,
    concatenation_pairwise,
    dot_product_pairwise,
    softmax_pairwise,
)

# Channels and stride of a ResNet's stages.
STAGES = {"res2": (256, 4), "res3": (512, 8), "res4": (1024, 16), "res5": (2048, 32)}

# theta (B, N_q, d), phi (B, N_k, d), g (B, N_k, c) to y (B, N_q, c)
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
# The whole block, (B, C, H, W) to the same shape, and the operation, or None if it cannot be
# taken out of the block.
Built = tuple[nn.Module, Optional[Operation]]


@dataclass(frozen=True)
class Case:
    """One block after one stage. ``image_size`` is (height, width) in pixels."""

    stage: str
    pairwise: str
    subsample: str = "none"
    batch: int = 1
    image_size: tuple[int, int] = (800, 1344)

    @property
    def grid(self) -> tuple[int, int]:
        stride = STAGES[self.stage][1]
        return self.image_size[0] // stride, self.image_size[1] // stride

    @property
    def positions(self) -> int:
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        return f"{self.stage} {self.pairwise}, subsample {self.subsample}, N = {self.positions:,}"


class Implementation(NamedTuple):
    """Its name, how to build it with the weights of our block, and what it computes."""

    name: str
    build: Callable[[NonLocalBlock], Built]  # raises ImportError if it is not installed
    pairwise: tuple[str, ...] = tuple(PAIRWISE)
    subsample: tuple[str, ...] = SUBSAMPLE


def make_block(case: Case) -> NonLocalBlock:
    """
    Our block with random weights, the same for the same case. Batch norm is in evaluation mode.
    Where x has variance 8 / C, its embeddings and W_z y are of the order of 1.
    """
    torch.manual_seed(0)
    # The others scale the logits of the embedded Gaussian, but not those of the Gaussian.
    block = NonLocalBlock(
        STAGES[case.stage][0],
        pairwise=case.pairwise,
        scale=case.pairwise == "embedded_gaussian",
        subsample=case.subsample,
    )
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name == "norm.weight":
                parameter.fill_(1)
            elif name in ("theta.weight", "phi.weight", "g.weight"):
                parameter.normal_(std=8**-0.5)
            else:
                parameter.normal_(std=0.1 if parameter.dim() == 1 else block.g.out_channels**-0.5)
    return block.eval()


def make_input(case: Case) -> Tensor:
    """
    (B, C, H, W), normally distributed with variance 8 / C: the Gaussian's x_i^T x_i are about 8,
    so that its softmax sees more than the position itself.
    """
    torch.manual_seed(1)
    channels = STAGES[case.stage][0]
    return torch.randn(case.batch, channels, *case.grid) * (8 / channels) ** 0.5


def embed(block: NonLocalBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """theta (B, N_q, d), phi (B, N_k, d) and g (B, N_k, c) of a block for images (B, C, H, W)."""
    keys = functional.max_pool2d(x, 2) if block.subsample == "input" else x
    theta, phi = (x, keys) if block.theta is None else (block.theta(x), block.phi(keys))
    g = block.g(keys)
    if block.subsample == "embeddings":
        phi, g = functional.max_pool2d(phi, 2), functional.max_pool2d(g, 2)
    return theta.flatten(2).mT, phi.flatten(2).mT, g.flatten(2).mT


class BlockAround(nn.Module):
    """The block of given weights around an operation."""

    def __init__(self, block: NonLocalBlock, operation: Operation) -> None:
        super().__init__()
        self.block, self.operation = block, operation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        y = self.operation(*embed(self.block, x)).mT.unflatten(2, x.shape[2:])
        z = self.block.out(y)
        return x + (z if self.block.norm is None else self.block.norm(z))


def _ours(block: NonLocalBlock) -> Built:
    def concatenation(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        return concatenation_pairwise(*_concat_terms(block, theta, phi), g)

    def softmax(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        return softmax_pairwise(theta, phi, g, block.logit_scale)

    operations = {"dot_product": dot_product_pairwise, "concatenation": concatenation}
    return block, operations.get(block.pairwise, softmax)


def _textbook(block: NonLocalBlock) -> Built:
    def y(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """y_i = 1 / C(x) * sum_j f(x_i, x_j) g(x_j) (Eq. 1), holding f for all pairs."""
        if block.pairwise == "dot_product":
            return (theta / phi.shape[1]) @ phi.mT @ g
        if block.pairwise == "concatenation":
            # w_f^T [theta_i, phi_j], without the 2d x N x N tensor of concatenated embeddings.
            a, b = _concat_terms(block, theta, phi)
            return (a.unsqueeze(2) + b.unsqueeze(1)).relu() @ (g / phi.shape[1])
        return (block.logit_scale * theta @ phi.mT).softmax(2) @ g

    return BlockAround(block, y), y


def _concat_terms(block: NonLocalBlock, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    w_theta, w_phi = block.concat.weight.flatten().chunk(2)
    return theta @ w_theta, phi @ w_phi


def _mmcv(block: NonLocalBlock) -> Built:
    module = importlib.import_module("mmcv.cnn.bricks.non_local")
    weights, arguments = _converted(block, "mmcv", dims=2)
    theirs = getattr(module, arguments.pop("type"))(**arguments)
    theirs.load_state_dict(weights)

    def y(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        if block.pairwise == "concatenation":
            return theirs.concatenation(theta.mT.unsqueeze(3), phi.mT.unsqueeze(2)) @ g
        return getattr(theirs, block.pairwise)(theta, phi.mT) @ g

    return theirs, y


def _pytorchvideo(block: NonLocalBlock) -> Built:
    module = importlib.import_module("pytorchvideo.layers.nonlocal_net")
    weights, arguments = _converted(block, "pytorchvideo", dims=3)
    theirs = module.create_nonlocal(**arguments)
    theirs.load_state_dict(weights)
    return _OneFrame(theirs), None


def _timm(block: NonLocalBlock) -> Built:
    module = importlib.import_module("timm.layers.non_local_attn")
    width = block.g.out_channels
    theirs = module.NonLocalAttn(block.in_channels, rd_channels=width, rd_divisor=1)
    # Its children come in the order of ours.
    theirs.load_state_dict(dict(zip(theirs.state_dict(), block.state_dict().values())))
    theirs.scale = block.logit_scale  # it takes C^-1/2, we d^-1/2
    return theirs, None


class _OneFrame(nn.Sequential):
    """A block for videos on images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(2)).squeeze(2)


def _converted(
    block: NonLocalBlock, to: str, dims: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of ``block`` for another implementation, and what to build its block with."""
    result = convert(
        block.state_dict(),
        to=to,
        pairwise=block.pairwise,
        scale=block.logit_scale != 1,
        subsample=block.subsample,
        dims=dims,
    )
    return result.state_dict, next(iter(result.settings.values()))


OURS, TEXTBOOK = "nl_detectron", "textbook N x N"
# The first is what the others are compared with.
IMPLEMENTATIONS = (
    Implementation(OURS, _ours),
    Implementation(TEXTBOOK, _textbook),
    Implementation("mmcv", _mmcv, subsample=("none", "embeddings")),
    Implementation(
        "PyTorchVideo", _pytorchvideo, ("embedded_gaussian", "dot_product"), ("none", "input")
    ),
    Implementation("timm", _timm, ("embedded_gaussian",), ("none",)),
)
NAMES = tuple(implementation.name for implementation in IMPLEMENTATIONS)


def build_all(
    block: NonLocalBlock, names: Collection[str]
) -> tuple[dict[str, Built], dict[str, str]]:
    """Those of ``names`` that compute what ``block`` does, and why the others do not."""
    built, reasons = {}, {}
    for name, build, pairwise, subsample in IMPLEMENTATIONS:
        if name not in names:
            continue
        if block.pairwise not in pairwise:
            reasons[name] = f"{name} has no pairwise={block.pairwise!r}"
        elif block.subsample not in subsample:
            reasons[name] = f"{name} has no subsample={block.subsample!r}"
        else:
            try:
                module, operation = build(block)
                built[name] = module.eval().to(block.g.weight.device), operation
            except ImportError as error:
                reasons[name] = f"{name} is not installed: {error}"
    return built, reasons
