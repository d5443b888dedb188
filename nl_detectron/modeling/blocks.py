"""The kinds of blocks that a config can choose, and what there is to ask about a model's blocks."""

from __future__ import annotations

import re
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase
from detectron2.utils.registry import Registry
from torch import nn

from nl_detectron.config import keys_for_arguments, nonlocal_node
from nl_detectron.layers import AttentionBlock, GlobalContextBlock, LocalBlock, NonLocalBlock
from nl_detectron.validation import check_choice

NONLOCAL_BLOCK_REGISTRY = Registry("NONLOCAL_BLOCK")
NONLOCAL_BLOCK_REGISTRY.__doc__ = """
Blocks for ``MODEL.NONLOCAL.BLOCK``. A registered class or function is called with
``(cfg, in_channels)`` and gives a Detectron2 ``CNNBlockBase`` with as many output channels, whose
output has the size of its input.
"""

_INSERTED = re.compile(r"nonlocal\d+")  # the names that inserted blocks get


def build_block(cfg: CfgNode, in_channels: int) -> CNNBlockBase:
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
        model's order, by full names such as ``backbone.res4.nonlocal4``.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and is_nonlocal_block(name, module)
    }


def is_nonlocal_block(name: str, module: nn.Module) -> bool:
    """
    Args:
        name: the name of ``module`` in its parent, or its full name.
        module: any module.

    Returns:
        Whether it is a block of ours: one that was inserted, of whatever class, or a
        :class:`AttentionBlock` that was put there in another way.
    """
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
    weight = _weight(getattr(block, "out", None))
    return None if weight is None else weight.norm().item()


def mean_abs_gamma(block: nn.Module) -> float | None:
    """
    Args:
        block: any of :func:`nonlocal_blocks`.

    Returns:
        The mean of |gamma|, the scale of the norm after W_z; None without one.
    """
    gamma = _weight(norm_after_out(block))
    return None if gamma is None else gamma.abs().mean().item()


def norm_after_out(block: nn.Module) -> nn.Module | None:
    """
    Args:
        block: any of :func:`nonlocal_blocks`.

    Returns:
        The norm after W_z, whose scale is gamma; None without one. A global context block has its
        norm in front of W_2.
    """
    return None if isinstance(block, GlobalContextBlock) else getattr(block, "norm", None)


def _weight(layer: nn.Module | None) -> Any:
    weight = getattr(layer, "weight", None)
    return None if weight is None else weight.detach().float()


def _nonlocal_block_options(cfg: CfgNode, in_channels: int) -> dict[str, Any]:
    node = nonlocal_node(cfg)
    return {
        "in_channels": in_channels,
        "pairwise": node.PAIRWISE,
        "reduction": node.REDUCTION,
        "scale": node.SCALE,
        "temperature": node.TEMPERATURE,
        "subsample": node.SUBSAMPLE,
        "norm": node.NORM,
        "zero_init": node.ZERO_INIT,
        "zero_init_layer": node.ZERO_INIT_LAYER,
        "use_act_checkpoint": node.USE_ACT_CHECKPOINT,
    }


def _global_context_options(cfg: CfgNode, in_channels: int) -> dict[str, Any]:
    node = nonlocal_node(cfg)
    return {
        "in_channels": in_channels,
        "reduction": node.REDUCTION,
        "zero_init": node.ZERO_INIT,
    }


def _local_block_options(cfg: CfgNode, in_channels: int) -> dict[str, Any]:
    node = nonlocal_node(cfg)
    return {
        "in_channels": in_channels,
        "norm": node.NORM,
        "zero_init": node.ZERO_INIT,
        "zero_init_layer": node.ZERO_INIT_LAYER,
    }


# Detectron2's configurable translates configs for classes that know nothing of them.
for _block, _options in [
    (NonLocalBlock, _nonlocal_block_options),
    (GlobalContextBlock, _global_context_options),
    (LocalBlock, _local_block_options),
]:
    NONLOCAL_BLOCK_REGISTRY.register(configurable(from_config=_options)(_block))
