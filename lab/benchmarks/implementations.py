"""What is computed, and who computes it. A new implementation is an entry in the table below."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.benchmarks import peers
from lab.benchmarks.peers import Block, Built, Operation
from nl_detectron.layers import (
    ATTENTION,
    SUBSAMPLE,
    GlobalContextBlock,
    NonLocalBlock,
    concatenation_pairwise,
    disentangled_pairwise,
    dot_product_pairwise,
    softmax_pairwise,
)

# Channels and stride of a ResNet's stages.
STAGES = {"res2": (256, 4), "res3": (512, 8), "res4": (1024, 16), "res5": (2048, 32)}

# The dtype of activations, and whether the GPU may round float32 products to TF32. Of half
# precision a block has float32 weights, under autocast.
PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
}

# A block's pairwise function, or "global_context" for a block of that kind.
FUNCTIONS = tuple(ATTENTION)
CONTEXT_REDUCTION = 16


@dataclass(frozen=True)
class Case:
    """
    One block after one stage. ``image_size`` is (height, width) in pixels, ``precision`` a key of
    ``PRECISIONS``.
    """

    stage: str
    pairwise: str
    subsample: str = "none"
    batch: int = 1
    image_size: tuple[int, int] = (800, 1344)
    precision: str = "fp32"

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
    build: Callable[[Block], Built]  # raises ImportError if it is not installed
    pairwise: tuple[str, ...] = FUNCTIONS
    subsample: tuple[str, ...] = SUBSAMPLE


def make_block(case: Case) -> Block:
    """
    Our block with random weights, the same for the same case. Batch norm is in evaluation mode.
    Where x has variance 8 / C, its embeddings and what is added to it are of the order of 1.
    """
    torch.manual_seed(0)
    channels = STAGES[case.stage][0]
    block: Block
    if case.pairwise == "global_context":
        block = GlobalContextBlock(channels, reduction=CONTEXT_REDUCTION)
    else:
        # The others scale the logits of the embedded Gaussian, but not those of the Gaussian.
        scale = case.pairwise in ("embedded_gaussian", "disentangled")
        block = NonLocalBlock(
            channels, pairwise=case.pairwise, scale=scale, subsample=case.subsample
        )
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name == "norm.weight":
                parameter.fill_(1)
            elif name in ("out.weight", "concat.weight"):
                parameter.normal_(std=block.out.in_channels**-0.5)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=8**-0.5)
    return block.eval()


def make_input(case: Case) -> Tensor:
    """
    (B, C, H, W), normally distributed with variance 8 / C: the Gaussian's x_i^T x_i are about 8,
    so that its softmax sees more than the position itself.
    """
    torch.manual_seed(1)
    channels = STAGES[case.stage][0]
    return torch.randn(case.batch, channels, *case.grid) * (8 / channels) ** 0.5


def embed(block: NonLocalBlock, x: Tensor) -> tuple[Tensor, ...]:
    """
    theta (B, N_q, d), phi (B, N_k, d), g (B, N_k, c) of a block for images (B, C, H, W), and its m
    (B, N_k, 1), if it has one.
    """
    keys = functional.max_pool2d(x, 2) if block.subsample == "input" else x
    theta = x if block.theta is None else block.theta(x)
    phi = keys if block.phi is None else block.phi(keys)
    by_key = [phi, block.g(keys), *([] if block.unary is None else [block.unary(keys)])]
    if block.subsample == "embeddings":
        by_key = [functional.max_pool2d(t, 2) for t in by_key]
    if block.subsample == "pyramid":
        by_key = [
            torch.cat([functional.adaptive_avg_pool2d(t, n).flatten(2) for n in (1, 3, 6, 8)], 2)
            for t in by_key
        ]
    return theta.flatten(2).mT, *(t.flatten(2).mT for t in by_key)


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


class TextbookContext(nn.Module):
    """A global context block, as one writes it from the equation."""

    def __init__(self, block: GlobalContextBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        weights = self.block.context(x).flatten(2).softmax(2)
        context = (x.flatten(2) @ weights.mT).unsqueeze(3)
        reduced = self.block.norm(self.block.reduce(context).flatten(1)).relu()
        return x + self.block.out(reduced[:, :, None, None])


def _ours(block: Block) -> Built:
    return block, None if isinstance(block, GlobalContextBlock) else _our_operation(block)


def _our_operation(block: NonLocalBlock) -> Operation:
    scale = block.logit_scale
    operations: dict[str, Operation] = {
        "dot_product": dot_product_pairwise,
        "concatenation": lambda theta, phi, g: concatenation_pairwise(
            *_concat_terms(block, theta, phi), g
        ),
        "disentangled": lambda theta, phi, g, m: disentangled_pairwise(
            theta, phi, m.squeeze(2), g, scale / block.temperature
        ),
    }
    return operations.get(
        block.pairwise, lambda theta, phi, g: softmax_pairwise(theta, phi, g, scale)
    )


def _textbook(block: Block) -> Built:
    if isinstance(block, GlobalContextBlock):
        return TextbookContext(block), None

    def y(theta: Tensor, phi: Tensor, g: Tensor, m: Tensor | None = None) -> Tensor:
        """y_i = 1 / C(x) * sum_j f(x_i, x_j) g(x_j) (Eq. 1), holding f for all pairs."""
        if block.pairwise == "dot_product":
            return (theta / phi.shape[1]) @ phi.mT @ g
        if block.pairwise == "concatenation":
            # w_f^T [theta_i, phi_j], without the 2d x N x N tensor of concatenated embeddings.
            a, b = _concat_terms(block, theta, phi)
            return (a.unsqueeze(2) + b.unsqueeze(1)).relu() @ (g / phi.shape[1])
        if m is not None:
            theta, phi = (t - t.mean(1, keepdim=True) for t in (theta, phi))
            pairs = (block.logit_scale / block.temperature * theta @ phi.mT).softmax(2)
            return pairs @ g + m.softmax(1).mT @ g
        return (block.logit_scale * theta @ phi.mT).softmax(2) @ g

    return BlockAround(block, y), y


def _concat_terms(block: NonLocalBlock, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    w_theta, w_phi = block.get_parameter("concat.weight").flatten().to(theta.dtype).chunk(2)
    return theta @ w_theta, phi @ w_phi


OURS, TEXTBOOK = "nl_detectron", "textbook N x N"
# Those of the paper.
FOUR = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
# The first is what the others are compared with.
IMPLEMENTATIONS = (
    Implementation(OURS, _ours),
    Implementation(TEXTBOOK, _textbook),
    Implementation("mmcv", peers.mmcv, (*FOUR, "global_context"), ("none", "embeddings")),
    Implementation(
        "PyTorchVideo", peers.pytorchvideo, ("embedded_gaussian", "dot_product"), ("none", "input")
    ),
    Implementation("timm", peers.timm, ("embedded_gaussian",), ("none",)),
    Implementation("mmsegmentation", peers.disentangled, ("disentangled",), ("none",)),
    Implementation("mmsegmentation's ANN", peers.pyramid, ("embedded_gaussian",), ("pyramid",)),
)
NAMES = tuple(implementation.name for implementation in IMPLEMENTATIONS)


def build_all(
    block: Block,
    names: Collection[str],
    implementations: Sequence[Implementation] = IMPLEMENTATIONS,
) -> tuple[dict[str, Built], dict[str, str]]:
    """Those of ``names`` that compute what ``block`` does, and why the others do not."""
    built, reasons = {}, {}
    for name, build, pairwise, subsample in implementations:
        if name not in names:
            continue
        if block.pairwise not in pairwise:
            reasons[name] = f"{name} has no pairwise={block.pairwise!r}"
        elif block.subsample not in subsample:
            reasons[name] = f"{name} has no subsample={block.subsample!r}"
        else:
            try:
                module, operation = build(block)
                built[name] = module.eval().to(block.out.weight.device), operation
            except ImportError as error:
                reasons[name] = f"{name} is not installed: {error}"
    return built, reasons
