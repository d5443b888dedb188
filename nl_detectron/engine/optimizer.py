"""Learning rates of their own for non-local blocks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from nl_detectron.modeling import gamma_parameters, nonlocal_blocks
from nl_detectron.validation import ArgumentError

logger = logging.getLogger(__name__)

ParamGroup = dict[str, Any]
"""One of PyTorch's optimizers' parameter groups."""


def get_optimizer_params(
    model: nn.Module,
    base_lr: float,
    *,
    gamma_lr_factor: float = 1.0,
    lr_factor: float = 1.0,
    **options: Any,
) -> list[ParamGroup]:
    """
    Detectron2's ``get_default_optimizer_params`` with other learning rates for non-local blocks,
    for a LazyConfig's ``optimizer.params`` or an optimizer of your own.

    Args:
        base_lr: the learning rate of all else.
        gamma_lr_factor, lr_factor: as for :func:`scale_block_lr`, which raises for them, too.
        **options: the others of Detectron2's function.
    """
    groups = get_default_optimizer_params(model, base_lr, **options)
    return scale_block_lr(groups, model, gamma_lr_factor, lr_factor)


def scale_block_lr(
    groups: Sequence[ParamGroup], model: nn.Module, gamma_lr_factor: float, lr_factor: float
) -> list[ParamGroup]:
    """
    Multiply the learning rates of non-local blocks, and take weight decay off their gamma and beta,
    the scale and offset of the norm after W_z.

    Args:
        groups: parameter groups, each with ``lr`` and, or else the optimizer's default is meant,
            ``weight_decay``, such as ``optimizer.param_groups`` before the first step.
        gamma_lr_factor: for gamma and beta, above 0.
        lr_factor: for all other parameters of the blocks, above 0.

    Returns:
        The groups, those split of which some parameters get another learning rate or weight decay.

    Raises:
        ValueError: a factor is not above 0.
    """
    for name, factor in [("gamma_lr_factor", gamma_lr_factor), ("lr_factor", lr_factor)]:
        if not factor > 0:
            raise ArgumentError(name, f"is {factor!r}, but must be a number above 0")
    blocks = nonlocal_blocks(model).values()
    gammas = {parameter for block in blocks for parameter in gamma_parameters(block)}
    others = {parameter for block in blocks for parameter in block.parameters()} - gammas
    if (gamma_lr_factor, lr_factor) != (1, 1):
        logger.info(
            f"Learning rates of {len(blocks)} non-local blocks: {gamma_lr_factor:g} times the "
            f"model's for gamma and beta ({len(gammas)} tensors), {lr_factor:g} times for the "
            f"other {len(others)} tensors"
        )
    split: list[ParamGroup] = []
    for group in groups:
        parts: dict[tuple[float, float | None], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            lr, weight_decay = group["lr"], group.get("weight_decay")
            if parameter in gammas:
                lr, weight_decay = gamma_lr_factor * lr, 0.0
            elif parameter in others:
                lr = lr_factor * lr
            parts.setdefault((lr, weight_decay), []).append(parameter)
        for (lr, weight_decay), parameters in parts.items():
            part = {**group, "params": parameters, "lr": lr}
            split.append(part if weight_decay is None else {**part, "weight_decay": weight_decay})
    return split
