"""The kinds of blocks that a config can choose, and what there is to ask about a model's blocks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from nl_detectron.config import keys_for_arguments, nonlocal_node
from nl_detectron.layers import (
    AttentionBlock,
    GlobalContextBlock,
    LocalBlock,
    NonLocalBlock,
    TimmAttention,
)
from nl_detectron.layers.children import evaluating, matrix_and_bias
from nl_detectron.layers.numerics import accumulable
from nl_detectron.surgery import look_through
from nl_detectron.validation import check_choice

NONLOCAL_BLOCK_REGISTRY = Registry("NONLOCAL_BLOCK")
NONLOCAL_BLOCK_REGISTRY.__doc__ = """
Blocks for ``MODEL.NONLOCAL.BLOCK``. A registered class or function is called with
``(cfg, in_channels)`` and gives any module whose output has shape and dtype of its input.
"""

_INSERTED = re.compile(r"nonlocal\d*")  # the names that inserted blocks get
_WRAPPER = re.compile(r"\._(checkpoint|fsdp)_wrapped_module")  # no part of the names of tensors


def build_block(cfg: CfgNode, in_channels: int) -> nn.Module:
    """
    The block that ``MODEL.NONLOCAL.BLOCK`` names, for C channels.

    Raises:
        ValueError: there is no ``MODEL.NONLOCAL``, or a value in it is not legal; the message names
            the key.
    """
    node = nonlocal_node(cfg)
    check_choice("MODEL.NONLOCAL.BLOCK", node.BLOCK, [name for name, _ in NONLOCAL_BLOCK_REGISTRY])
    with keys_for_arguments(node):
        return NONLOCAL_BLOCK_REGISTRY.get(node.BLOCK)(cfg, in_channels)


def nonlocal_blocks(model: nn.Module, kind: type[nn.Module] = nn.Module) -> dict[str, Any]:
    """
    What was inserted into a model, and every other :class:`AttentionBlock` in it, as far as it is
    of a kind, in the model's order, by full names such as ``backbone.res4.nonlocal4``; of a wrapper
    (``torch.compile``, ``checkpoint_wrapper``) the block that it holds.
    """
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if is_nonlocal_block(name, module):
            block = look_through(module, lambda inner: isinstance(inner, CNNBlockBase))
            found.setdefault(block, _WRAPPER.sub("", name))
    return {name: block for block, name in found.items() if isinstance(block, kind)}


def is_nonlocal_block(name: str, module: nn.Module) -> bool:
    """Was it inserted, or is it an :class:`AttentionBlock`? ``name`` may be any end of its name."""
    is_inserted = _INSERTED.fullmatch(name.rpartition(".")[2]) is not None
    return is_inserted or isinstance(module, AttentionBlock)


def out_weight_norm(block: nn.Module) -> float | None:
    """
    ||W_z||, the Frobenius norm (of a global context block ||W_2||); None if the block has no
    ``out``.
    """
    weight = out_weight(block)
    return None if weight is None else weight.norm().item()


@torch.no_grad()
def out_weight(block: nn.Module) -> Tensor | None:
    """W_z, (..., C), as ``out`` multiplies when it is called: what it has may be out of date."""
    out: Any = getattr(block, "out", None)
    if (weight := getattr(out, "weight", None)) is None:
        return None
    weight = accumulable(weight.detach())
    if weight.dim() < 2 or weight.shape[2:].numel() > 1:  # no 1x1 convolution: another's block
        return weight.flatten(1).mT if weight.dim() > 1 else weight
    channels = getattr(out, "in_channels", weight.shape[1])
    with evaluating(out):
        return matrix_and_bias(out, channels, weight.dim() - 2, weight)[0]


def mean_abs_gamma(block: nn.Module) -> float | None:
    """The mean of |gamma|, the scale of what a block adds; None without one."""
    gamma = getattr(block, "gamma", None)
    gamma = getattr(norm_after_out(block), "weight", None) if gamma is None else gamma
    return None if gamma is None else gamma.detach().float().abs().mean().item()


def gamma_parameters(block: nn.Module) -> list[nn.Parameter]:
    """gamma, the scale of what a block adds, and beta, the offset, as far as it has them."""
    gamma, norm = getattr(block, "gamma", None), norm_after_out(block)
    return [gamma] if isinstance(gamma, nn.Parameter) else list(norm.parameters() if norm else [])


def norm_after_out(block: nn.Module) -> nn.Module | None:
    """The norm after W_z; a global context block has its norm in front of W_2."""
    return None if isinstance(block, GlobalContextBlock) else getattr(block, "norm", None)


def _from_config(block: type[nn.Module]) -> Callable[..., dict[str, Any]]:
    """Gives each argument of a block the value of its key, which has the argument's name."""
    arguments = inspect.signature(block).parameters

    def from_config(cfg: CfgNode, in_channels: int) -> dict[str, Any]:
        node = nonlocal_node(cfg)
        options = {name: node[name.upper()] for name in arguments if name.upper() in node}
        return {"in_channels": in_channels, **options}

    return from_config


# Detectron2's configurable translates configs for classes that know nothing of them.
for _block in (NonLocalBlock, GlobalContextBlock, LocalBlock, TimmAttention):
    NONLOCAL_BLOCK_REGISTRY.register(configurable(from_config=_from_config(_block))(_block))
