"""Everyone who computes a softmax over all keys on a GPU, as implementations of the benchmark."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lab.benchmarks.implementations import (
    IMPLEMENTATIONS,
    OURS,
    TEXTBOOK,
    BlockAround,
    Implementation,
)
from lab.benchmarks.peers import Block, Built
from nl_detectron.layers import NonLocalBlock, softmax_pairwise
from nl_detectron.layers.softmax import SDPA, TILES, SoftmaxPlan

# theta (B, N_q, d), phi (B, N_k, d), g (B, N_k, c) and the scale, to y (B, N_q, c)
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]

CANDIDATES = {
    "tiles of 4M pairs": SoftmaxPlan(TILES, max_pairs=2**22),
    "tiles of 16M pairs": SoftmaxPlan(TILES, max_pairs=2**24),
    "tiles of 64M pairs": SoftmaxPlan(TILES, max_pairs=2**26),
    "dense": SoftmaxPlan(TILES, keep=True),
    "sdpa": SoftmaxPlan(SDPA),
}
"""What ``softmax.choose`` may choose from on CUDA; tiles multiply float32."""

FLEX = "FlexAttention"
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
# What fits into the shared memory of an H100 at 512 channels, where the default does not.
_FLEX_OPTIONS = {
    **{"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1},
    **{"BLOCK_M1": 16, "BLOCK_N1": 16, "BLOCK_M2": 16, "BLOCK_N2": 16},
}


def _implementation(name: str, attend: Attend) -> Implementation:
    def build(block: Block) -> Built:
        assert isinstance(block, NonLocalBlock)

        def y(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
            return attend(theta, phi, g, block.logit_scale)

        return BlockAround(block, y), y

    return Implementation(name, build, ("gaussian", "embedded_gaussian"))


def _planned(plan: SoftmaxPlan) -> Attend:
    return functools.partial(softmax_pairwise, plan=plan)


def _sdpa(backend: str) -> Attend:
    """One of the kernels of ``scaled_dot_product_attention``; its error says why it refuses."""

    def attend(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
        # Not in PyTorch before 2.3.
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # No fused kernel takes the strides that a block's convolutions give.
        theta, phi, g = (t.unsqueeze(1).contiguous() for t in (theta, phi, g))

        def run() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return functional.scaled_dot_product_attention(theta, phi, g, scale=scale).squeeze(
                    1
                )

        try:
            return run()
        except RuntimeError as error:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    return run()
                except RuntimeError:
                    reasons = [str(w.message).partition(" (Triggered")[0] for w in caught]
            raise RuntimeError(_reason(reasons) or str(error)) from error

    return attend


def _reason(messages: list[str]) -> str:
    """PyTorch warns of each kernel "not used because:", and then why."""
    return " ".join(m for m in messages if "not used because" not in m and "disabled" not in m)


@functools.cache
def _compiled_flex(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention  # not in PyTorch before 2.5

    if device != "cuda":  # it would compile for a minute, and has no backward pass there
        return flex_attention
    return torch.compile(flex_attention, dynamic=False)


def _flex(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    inputs = [t.unsqueeze(1).contiguous() for t in (theta, phi, g)]
    attend = _compiled_flex(theta.device.type)
    return attend(*inputs, scale=scale, kernel_options=_FLEX_OPTIONS).squeeze(1)


# The first, what ``softmax.choose`` chooses, is what the others are compared with.
KERNELS = (
    *(i for i in IMPLEMENTATIONS if i.name in (OURS, TEXTBOOK)),
    *(_implementation(name, _planned(plan)) for name, plan in CANDIDATES.items()),
    *(_implementation(f"SDPA {backend.lower()}", _sdpa(backend)) for backend in BACKENDS),
    _implementation(FLEX, _flex),
)
KERNEL_NAMES = tuple(kernel.name for kernel in KERNELS)
