"""Putting blocks into a model that is already built, without renaming anything in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nl_detectron.layers import NonLocalBlock
from nl_detectron.modeling.first_step import announce_at_first_step
from nl_detectron.modeling.network import PlacementError
from nl_detectron.modeling.places import Place, Places, find_places
from nl_detectron.surgery import HEIGHT, WIDTH, describe, like, undisturbed

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def insert_nonlocal_blocks(module: Model, places: Places, **block_options: Any) -> Model:
    """
    Put non-local blocks into a model, in place: :func:`insert_blocks` with :class:`NonLocalBlock`.

    Args:
        module: see :func:`insert_blocks`.
        places: see :func:`insert_blocks`.
        **block_options: for :class:`NonLocalBlock`, such as ``pairwise="dot_product"``.

    Returns:
        The same module.

    Raises:
        ValueError: :func:`insert_blocks` or :class:`NonLocalBlock` refuses a value. The module is
            then as it was.
    """
    if block_options.get("dims", 2) != 2:
        raise ValueError(f"dims is {block_options['dims']}, but the features of a backbone are 2-D")
    return insert_blocks(module, places, partial(NonLocalBlock, **block_options))


def insert_blocks(module: Model, places: Places, make_block: Callable[[int], nn.Module]) -> Model:
    """
    Put blocks into a model, in place. Nothing is renamed, so that every checkpoint of the model
    still fits. A block takes device, dtype and mode of what it is put into; where that is frozen it
    is frozen too.

    Args:
        module: a backbone, or any other model.
        places: one of

            - stage name to the residual blocks after which a block comes, counted from 0, negatives
              from the end; -2 is "right before the last one". With ``{"res4": [-2]}``, ``res4`` of
              a ResNet-50 holds ``0 1 2 3 4 nonlocal4 5``. A stage runs its children in order, as
              Detectron2's do, and an ``nn.Sequential``.
            - a list of these for each stage of the backbone, from high to low resolution.
            - names, or patterns as in ``fnmatch``, of modules that return one tensor
              (B, C, H, W): ``["fpn_output4", "bottom_up.res4.*.conv3"]``. The block becomes the
              module's child ``nonlocal``, and is applied to what the module returns. Of modules in
              one another that fit a pattern, a block comes after the outermost.
        make_block: from a number of channels to a block, any module that keeps shape and dtype.

    Returns:
        The same module.

    Raises:
        PlacementError: a ValueError; there is no such place, or a block changes shape or dtype. The
            module is then as it was, as after any error of ``make_block``.
    """
    if any(isinstance(inner, DistributedDataParallel) for inner in module.modules()):
        raise PlacementError("put blocks in before DistributedDataParallel, which would miss them")
    planned = [
        (place, *_fitted(make_block(place.channels), place))
        for place in find_places(module, places)
    ]
    undo: list[Callable[[], None]] = []
    try:  # everything is legal; only now change the model
        for place, block, frozen in planned:
            undo.append(place.put(block))
            logger.log(
                logging.WARNING if frozen else logging.INFO,
                f"{type(block).__name__} {place.name} after {place.after} ({place.channels} "
                "channels)" + (": frozen, as its stage is; it will not learn" if frozen else ""),
            )
        if planned:
            announce_at_first_step(module, [(p.name, b, p.channels) for p, b, _ in planned])
    except BaseException:
        for take_away in reversed(undo):
            take_away()
        raise
    return module


def _fitted(block: nn.Module, place: Place) -> tuple[nn.Module, bool]:
    """A block made like what it comes into, and whether it is frozen; tried out."""
    if not isinstance(block, nn.Module):
        raise PlacementError(f"the block for {place.name} is {describe(block)}, not an nn.Module")
    sample = like(place.owner)
    block.to(device=sample.device, dtype=sample.dtype)
    parameters = list(place.owner.parameters())
    frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
    if not hasattr(block, "freeze"):  # Detectron2's stages ask it of all that is in them
        vars(block)["freeze"] = partial(_freeze, block)
    if frozen:
        cast(Any, block).freeze()
    x = sample.new_zeros(1, place.channels, 2 * HEIGHT, 2 * WIDTH)
    with undisturbed(block):
        z: Any = block(x)
    if not isinstance(z, torch.Tensor) or (z.shape, z.dtype) != (x.shape, x.dtype):
        raise PlacementError(
            f"the block for {place.name}, a {type(block).__name__}, returns {describe(z)} for "
            f"{describe(x)}, but must keep shape and dtype"
        )
    return block.train(place.owner.training), frozen


def _freeze(block: nn.Module) -> nn.Module:
    """As Detectron2's ``CNNBlockBase.freeze``."""
    block.requires_grad_(False)
    return FrozenBatchNorm2d.convert_frozen_batchnorm(block)
