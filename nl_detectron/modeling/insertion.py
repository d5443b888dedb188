"""Putting blocks between the residual blocks of a backbone that is already built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

from detectron2.layers import CNNBlockBase
from detectron2.modeling import Backbone
from torch import nn

from nl_detectron.layers import NonLocalBlock
from nl_detectron.modeling.blocks import is_nonlocal_block
from nl_detectron.modeling.first_step import announce_at_first_step
from nl_detectron.validation import check_choice

logger = logging.getLogger(__name__)

AfterBlocks = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]


class PlacementError(ValueError):
    """A backbone does not have the place that a block is asked for."""


def insert_nonlocal_blocks(
    backbone: Backbone, after_blocks: AfterBlocks, **block_options: Any
) -> Backbone:
    """
    Put non-local blocks into the stages of ``backbone``, in place: :func:`insert_blocks` with
    :class:`NonLocalBlock`.

    Args:
        backbone: see :func:`insert_blocks`.
        after_blocks: see :func:`insert_blocks`.
        **block_options: for :class:`NonLocalBlock`, such as ``pairwise="dot_product"``.

    Returns:
        The same backbone.

    Raises:
        ValueError: :func:`insert_blocks` or :class:`NonLocalBlock` refuses a value. The backbone is
            then as it was.
    """
    if block_options.get("dims", 2) != 2:
        raise ValueError(f"dims is {block_options['dims']}, but the features of a backbone are 2-D")
    return insert_blocks(backbone, after_blocks, partial(NonLocalBlock, **block_options))


def insert_blocks(
    backbone: Backbone, after_blocks: AfterBlocks, make_block: Callable[[int], CNNBlockBase]
) -> Backbone:
    """
    Put blocks into the stages of ``backbone``, in place. Nothing is renamed, so that every
    checkpoint of the backbone still fits: with ``{"res4": [-2]}``, ``res4`` of a ResNet-50 holds
    ``0 1 2 3 4 nonlocal4 5``. A block takes device, dtype and mode of its stage; in a frozen stage
    it is frozen too.

    Args:
        backbone: a backbone, or an FPN around one (its ``bottom_up``), whose stages run their
            children in order: Detectron2's ResNet and RegNet, or any with ``nn.Sequential``
            stages whose blocks state their ``out_channels``.
        after_blocks: stage name to the residual blocks after which a block comes, counted from 0,
            negatives from the end; -2 is "right before the last one". Or, without names, a list of
            them for each stage, from high to low resolution.
        make_block: from a number of channels to a block that keeps channels and size.

    Returns:
        The same backbone.

    Raises:
        PlacementError: a ValueError; there are no stages, no such stage, or a block index is out of
            range or named twice. The backbone is then as it was, as after any error of
            ``make_block``.
    """
    insertions = []
    for stage_name, stage, index in _places(backbone, after_blocks):
        previous_name = _residual_block_names(stage)[index]
        channels = _out_channels(stage_name, stage.get_submodule(previous_name))
        block = make_block(channels).train(stage.training)
        insertions.append((stage_name, stage, previous_name, f"nonlocal{index}", block))
    # Everything is legal; only now change the backbone.
    for stage_name, stage, previous_name, name, block in insertions:
        parameters = list(stage.parameters())
        if parameters:
            block.to(parameters[0])
        insert_child(stage, previous_name, name, block)
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if frozen:
            block.freeze()
        logger.log(
            logging.WARNING if frozen else logging.INFO,
            f"{type(block).__name__} {stage_name}.{name} after {stage_name}.{previous_name}"
            f" ({block.out_channels} channels)"
            + (": frozen, as its stage is; it will not learn" if frozen else ""),
        )
    inserted = [(f"{stage}.{name}", block) for stage, _, _, name, block in insertions]
    announce_at_first_step(backbone, [(name, b, b.out_channels) for name, b in inserted])
    return backbone


def find_stages(backbone: nn.Module) -> dict[str, nn.Module]:
    """
    Args:
        backbone: a backbone, or an FPN around one.

    Returns:
        The stages of ``backbone`` (of its ``bottom_up``, if it is an FPN) that run their children
        in order, by name, from high to low resolution; empty if there are none.
    """
    return {
        name: child
        for name, child in _body(backbone).named_children()
        if name != "stem" and _runs_children_in_order(child)
    }


def insert_child(parent: nn.Module, after: str, name: str, child: nn.Module) -> None:
    """
    Add a child to a module, in place and keeping all names (``nn.Sequential.insert`` renumbers what
    follows).

    Args:
        parent: the module.
        after: name of the child behind which the new one comes.
        name: name of the new one.
        child: the new one.
    """
    children = list(parent.named_children())
    position = [other for other, _ in children].index(after) + 1
    following = children[position:]
    for other, _ in following:
        delattr(parent, other)
    for other, module in [(name, child), *following]:
        parent.add_module(other, module)


def _places(backbone: nn.Module, after_blocks: AfterBlocks) -> list[tuple[str, nn.Module, int]]:
    """Stage name, stage and block index, counted from 0, of all that is asked for; checked."""
    stages = find_stages(backbone)
    if not stages:
        body = _body(backbone)
        raise PlacementError(
            f"{type(body).__name__} has no stages for non-local blocks: none of its children "
            f"({', '.join(name for name, _ in body.named_children())}) is an nn.Sequential or "
            "made of Detectron2's CNNBlockBase"
        )
    if not isinstance(after_blocks, Mapping):
        surplus = [number for number, i in enumerate(after_blocks, 1) if i and number > len(stages)]
        if surplus:
            raise PlacementError(
                f"it asks for blocks in stage number {surplus[0]}, but the backbone has "
                f"{len(stages)}: {', '.join(stages)}"
            )
        after_blocks = dict(zip(stages, after_blocks))
    try:
        for name in after_blocks:
            check_choice("stage", name, list(stages))
    except ValueError as error:
        raise PlacementError(str(error)) from None
    return [
        (name, stages[name], index)
        for name, indices in after_blocks.items()
        for index in _check_indices(name, stages[name], indices)
    ]


def _check_indices(stage_name: str, stage: nn.Module, indices: Sequence[int]) -> list[int]:
    if not isinstance(indices, Sequence) or isinstance(indices, str):
        raise PlacementError(
            f"{stage_name} is given {indices!r}, but needs a list of block indices, such as [-2]"
        )
    count = len(_residual_block_names(stage))
    checked: list[int] = []
    for index in indices:
        is_integer = isinstance(index, Integral) and not isinstance(index, bool)
        if not is_integer or not -count <= index < count:
            raise PlacementError(
                f"block index {index!r} in {stage_name}: {stage_name} has {count} blocks, so it "
                f"must be an integer from {-count} to {count - 1}"
            )
        from_start = int(index) % count
        block = stage.get_submodule(_residual_block_names(stage)[from_start])
        # TridentNet's; only the last block of such a stage gives a tensor.
        if getattr(block, "concat_output", True) is False:
            raise PlacementError(
                f"block index {index} in {stage_name}: a {type(block).__name__} gives a list of "
                "tensors, one for each of its branches, to the next; put the block after the last "
                f"one of {stage_name} (index -1), or into another stage"
            )
        if from_start in checked or hasattr(stage, f"nonlocal{from_start}"):
            raise PlacementError(
                f"block index {index} in {stage_name}: there is a non-local block after "
                f"{stage_name}'s block {from_start} already"
            )
        checked.append(from_start)
    return checked


def _body(backbone: nn.Module) -> nn.Module:
    """The network that has the stages: an FPN's bottom_up."""
    while isinstance(inner := getattr(backbone, "bottom_up", None), nn.Module):
        backbone = inner
    return backbone


def _runs_children_in_order(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return type(module).forward is nn.Sequential.forward
    # Detectron2's contract for the blocks of a stage; RegNet's stages are made so.
    children = list(module.children())
    is_container = not isinstance(module, (nn.ModuleList, nn.ModuleDict, CNNBlockBase))
    return bool(children) and is_container and all(isinstance(c, CNNBlockBase) for c in children)


def _residual_block_names(stage: nn.Module) -> list[str]:
    return [name for name, child in stage.named_children() if not is_nonlocal_block(name, child)]


def _out_channels(stage_name: str, block: nn.Module) -> int:
    channels = getattr(block, "out_channels", None)
    if not isinstance(channels, int):
        raise ValueError(
            f"a {type(block).__name__} in {stage_name} does not state its number of channels: "
            "give it an integer attribute out_channels, as Detectron2's CNNBlockBase has"
        )
    return channels
