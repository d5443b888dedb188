"""The implementations that are compared, all with the weights of the same block."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nl_detectron.benchmark.cases import Case
from nl_detectron.benchmark.textbook import TextbookBlock, concat_weight_of, textbook_operation
from nl_detectron.conversion import Conversion, ConversionError, convert
from nl_detectron.conversion.families import FAMILIES
from nl_detectron.layers import (
    NonLocalBlock,
    concatenation_pairwise,
    dot_product_pairwise,
    softmax_pairwise,
)

# theta (B, N_q, d), phi (B, N_k, d), g (B, N_k, c) to y (B, N_q, c)
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnavailableError(Exception):
    """An implementation cannot take part; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """``operation`` is None for an implementation whose block cannot be taken apart."""

    block: nn.Module
    operation: Operation | None = None


def make_block(case: Case) -> NonLocalBlock:
    """
    Our block with random weights, the same for the same case. Batch norm is in evaluation mode.
    Where x has variance 8 / C, its embeddings and W_z y are of the order of 1.
    """
    torch.manual_seed(0)
    block = NonLocalBlock(
        case.channels, pairwise=case.pairwise, scale=case.scale, subsample=case.subsample
    )
    inner_channels = block.g.out_channels
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            embeds_x = name in ("theta.weight", "phi.weight", "g.weight")
            if name == "norm.weight":
                parameter.fill_(1)
            elif parameter.dim() > 1:
                parameter.normal_(std=8**-0.5 if embeds_x else inner_channels**-0.5)
            else:
                parameter.normal_(std=0.1)
    return block.eval()


def make_input(case: Case) -> Tensor:
    """
    (B, C, H, W), normally distributed with variance 8 / C: the Gaussian's x_i^T x_i are about 8,
    so that its softmax sees more than the position itself.
    """
    torch.manual_seed(1)
    return torch.randn(case.batch, case.channels, *case.grid) * (8 / case.channels) ** 0.5


def make_contestant(name: str, block: NonLocalBlock) -> Contestant:
    """
    The implementation ``name``, one of ``CONTESTANTS``, with the weights of ``block``.

    Raises:
        UnavailableError: it is not installed, or does not compute the same function.
    """
    return CONTESTANTS[name](block)


def _ours(block: NonLocalBlock) -> Contestant:
    def concatenation(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        w_theta, w_phi = block.get_parameter("concat.weight").detach().flatten().chunk(2)
        return concatenation_pairwise(theta @ w_theta, phi @ w_phi, g)

    def softmax(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        return softmax_pairwise(theta, phi, g, block.logit_scale)

    operations = {"dot_product": dot_product_pairwise, "concatenation": concatenation}
    return Contestant(block, operations.get(block.pairwise, softmax))


def _textbook(block: NonLocalBlock) -> Contestant:
    weight = concat_weight_of(block)
    weight = None if weight is None else weight.detach()

    def operation(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        return textbook_operation(theta, phi, g, block.pairwise, block.logit_scale, weight)

    return Contestant(TextbookBlock(block), operation)


def _mmcv(block: NonLocalBlock) -> Contestant:
    non_local = _import("mmcv.cnn.bricks.non_local")
    weights, arguments = _convert(block, "mmcv")
    theirs = getattr(non_local, arguments.pop("type"))(**arguments)
    theirs.load_state_dict(weights)
    theirs.eval().to(block.g.weight.device)

    def operation(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        if block.pairwise == "concatenation":
            f = theirs.concatenation(theta.mT.unsqueeze(3), phi.mT.unsqueeze(2))
        else:
            f = getattr(theirs, block.pairwise)(theta, phi.mT)
        return f @ g

    return Contestant(theirs, operation)


def _pytorchvideo(block: NonLocalBlock) -> Contestant:
    nonlocal_net = _import("pytorchvideo.layers.nonlocal_net")
    weights, arguments = _convert(block, "pytorchvideo")
    theirs = nonlocal_net.create_nonlocal(**arguments)
    theirs.load_state_dict(weights)
    return Contestant(_OneFrame(theirs.eval().to(block.g.weight.device)))


def _timm(block: NonLocalBlock) -> Contestant:
    non_local_attn = _import("timm.layers.non_local_attn")
    for key, only in (("pairwise", "embedded_gaussian"), ("subsample", "none")):
        if (value := getattr(block, key)) != only:
            raise UnavailableError(f"not comparable: timm has no {key}={value!r}")
    theirs = non_local_attn.NonLocalAttn(
        block.in_channels, rd_channels=block.g.out_channels, rd_divisor=1
    )
    # It scales the logits by C^-1/2, we by d^-1/2.
    factor = (block.in_channels / block.g.out_channels) ** 0.5
    names = FAMILIES["timm"].modules
    weights = {}
    for name, tensor in block.state_dict().items():
        part, leaf = name.split(".")
        weights[f"{names[part]}.{leaf}"] = tensor * factor if part == "theta" else tensor
    theirs.load_state_dict(weights)
    return Contestant(theirs.eval().to(block.g.weight.device))


OURS = "nl_detectron"
TEXTBOOK = "textbook N x N"
# The first is what the others are compared with.
CONTESTANTS: dict[str, Callable[[NonLocalBlock], Contestant]] = {
    OURS: _ours,
    TEXTBOOK: _textbook,
    "mmcv": _mmcv,
    "PyTorchVideo": _pytorchvideo,
    "timm": _timm,
}


class _OneFrame(nn.Module):
    """A block for videos on images."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.unsqueeze(2)).squeeze(2)


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"not installed: {error}") from error


def _convert(block: NonLocalBlock, to: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of ``block`` for another implementation, and what to build its block with."""
    try:
        result: Conversion = convert(
            block.state_dict(),
            to=to,
            pairwise=block.pairwise,
            scale=block.logit_scale != 1,
            subsample=block.subsample,
            dims=3 if to == "pytorchvideo" else 2,
        )
    except ConversionError as error:
        reason = str(error).removeprefix("the block: ").partition(", only")[0]
        raise UnavailableError(f"not comparable: {reason}") from error
    (arguments,) = result.settings.values()
    return result.state_dict, arguments
