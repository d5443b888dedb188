"""The kinds of blocks that a config can choose, and what there is to ask about a model's blocks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase
from detectron2.utils.registry import Registry
from torch import nn

from nl_detectron.config import keys_for_arguments, nonlocal_node
from nl_detectron.layers import (
    AttentionBlock,
    GlobalContextBlock,
    LocalBlock,
    NonLocalBlock,
    TimmAttention,
)
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
    Args:
        cfg: a config with ``MODEL.NONLOCAL``.
        in_channels: C, channels of input and output.

    Returns:
        The block that ``MODEL.NONLOCAL.BLOCK`` names.

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
    Args:
        model: any module.
        kind: only blocks of this class, such as :class:`AttentionBlock`.

    Returns:
        What was inserted into the model, and every other :class:`AttentionBlock` in it, in the
        model's order, by full names such as ``backbone.res4.nonlocal4``; of a wrapper
        (``torch.compile``, ``checkpoint_wrapper``) the block that it holds.
    """
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if is_nonlocal_block(name, module):
            block = look_through(module, lambda inner: isinstance(inner, CNNBlockBase))
            found.setdefault(block, _WRAPPER.sub("", name))
    return {name: block for block, name in found.items() if isinstance(block, kind)}


def is_nonlocal_block(name: str, module: nn.Module) -> bool:
    """Was it inserted, or is it an :class:`AttentionBlock`? ``name`` is its full name, or any
    end of that."""
    is_inserted = _INSERTED.fullmatch(name.rpartition(".")[2]) is not None
    return is_inserted or isinstance(module, AttentionBlock)


def out_weight_norm(block: nn.Module) -> float | None:
    """
    Args:
        block: any of :func:`nonlocal_blocks`.

    Returns:
        ||W_z||, the Frobenius norm (of a global context block ||W_2||); None if the block has no
        ``out``.
    """
    weight = getattr(getattr(block, "out", None), "weight", None)
    return None if weight is None else weight.detach().float().norm().item()


def mean_abs_gamma(block: nn.Module) -> float | None:
    """
    Args:
        block: any of :func:`nonlocal_blocks`.

    Returns:
        The mean of |gamma|, the scale of what a block adds; None without one.
    """
    gamma = getattr(block, "gamma", None)
    gamma = getattr(norm_after_out(block), "weight", None) if gamma is None else gamma
    return None if gamma is None else gamma.detach().float().abs().mean().item()


def gamma_parameters(block: nn.Module) -> list[nn.Parameter]:
    """
    Args:
        block: any of :func:`nonlocal_blocks`.

    Returns:
        gamma, the scale of what the block adds, and beta, the offset, as far as it has them.
    """
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
