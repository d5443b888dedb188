"""Putting non-local blocks between the residual blocks of a backbone that is already built."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from detectron2.layers import CNNBlockBase
from detectron2.modeling import Backbone
from torch import nn

from nl_detectron.layers import NonLocalBlock
from nl_detectron.validation import check_choice

logger = logging.getLogger(__name__)


def insert_nonlocal_blocks(
    backbone: Backbone, after_blocks: Mapping[str, Sequence[int]], **block_options: Any
) -> Backbone:
    """
    Put non-local blocks into the stages of ``backbone``, in place. Nothing is renamed, so that
    every checkpoint of the backbone still fits: with ``{"res4": [-2]}``, ``res4`` of a ResNet-50
    holds ``0 1 2 3 4 nonlocal4 5``. Blocks in a frozen stage are frozen too.

    Args:
        backbone: a backbone, or an FPN around one (its ``bottom_up``), whose stages run their
            children in order: Detectron2's ResNet and RegNet, or any with ``nn.Sequential``
            stages whose blocks state their ``out_channels``.
        after_blocks: stage name to the residual blocks after which a non-local block comes,
            counted from 0, negatives from the end; -2 is "right before the last one".
        **block_options: for :class:`NonLocalBlock`, such as ``pairwise="dot_product"``.

    Returns:
        The same backbone.

    Raises:
        ValueError: an unknown stage, a block index that is out of range or named twice, or a
            value that :class:`NonLocalBlock` refuses. The backbone is then as it was.
    """
    stages = find_stages(backbone)
    if block_options.get("dims", 2) != 2:
        raise ValueError(f"dims is {block_options['dims']}, but the features of a backbone are 2-D")
    insertions = []
    for stage_name, indices in check_after_blocks(stages, after_blocks).items():
        stage = stages[stage_name]
        for index in indices:
            previous_name = _residual_block_names(stage)[index]
            channels = _out_channels(stage_name, stage.get_submodule(previous_name))
            block = NonLocalBlock(channels, **block_options).train(stage.training)
            insertions.append((stage_name, previous_name, f"nonlocal{index}", block))
    # Everything is legal; only now change the backbone.
    for stage_name, previous_name, name, block in insertions:
        stage = stages[stage_name]
        parameters = list(stage.parameters())
        if parameters:
            block.to(parameters[0])
        insert_child(stage, previous_name, name, block)
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if frozen:
            block.freeze()
        logger.log(
            logging.WARNING if frozen else logging.INFO,
            f"Non-local block {stage_name}.{name} after {stage_name}.{previous_name}"
            f" ({block.in_channels} channels)"
            + (": frozen, as its stage is; it will not learn" if frozen else ""),
        )
    return backbone


def find_stages(backbone: nn.Module) -> dict[str, nn.Module]:
    """
    The stages of ``backbone`` (of its ``bottom_up``, if it is an FPN) that run their children in
    order, by name, from high to low resolution.

    Raises:
        ValueError: there are none.
    """
    body = backbone
    while isinstance(inner := getattr(body, "bottom_up", None), nn.Module):
        body = inner
    stages = {
        name: child
        for name, child in body.named_children()
        if name != "stem" and _runs_children_in_order(child)
    }
    if not stages:
        raise ValueError(
            f"{type(body).__name__} has no stages for non-local blocks: none of its children "
            f"({', '.join(name for name, _ in body.named_children())}) is an nn.Sequential or "
            "made of Detectron2's CNNBlockBase"
        )
    return stages


def insert_child(parent: nn.Module, after: str, name: str, child: nn.Module) -> None:
    """
    Add ``child`` to ``parent`` right behind its child ``after``, in place and keeping all names
    (``nn.Sequential.insert`` renumbers what follows).
    """
    children = list(parent.named_children())
    position = [other for other, _ in children].index(after) + 1
    following = children[position:]
    for other, _ in following:
        delattr(parent, other)
    for other, module in [(name, child), *following]:
        parent.add_module(other, module)


def _runs_children_in_order(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return type(module).forward is nn.Sequential.forward
    # Detectron2's contract for the blocks of a stage; RegNet's stages are made so.
    children = list(module.children())
    is_container = not isinstance(module, (nn.ModuleList, nn.ModuleDict, CNNBlockBase))
    return bool(children) and is_container and all(isinstance(c, CNNBlockBase) for c in children)


def _residual_block_names(stage: nn.Module) -> list[str]:
    return [name for name, c in stage.named_children() if not isinstance(c, NonLocalBlock)]


def check_after_blocks(
    stages: Mapping[str, nn.Module], after_blocks: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """
    ``after_blocks`` with all indices counted from 0.

    Raises:
        ValueError: an unknown stage, or a block index that is out of range or named twice.
    """
    for stage_name in after_blocks:
        check_choice("stage", stage_name, list(stages))
    return {name: _check_indices(name, stages[name], after_blocks[name]) for name in after_blocks}


def _check_indices(stage_name: str, stage: nn.Module, indices: Sequence[int]) -> list[int]:
    if not isinstance(indices, Sequence) or isinstance(indices, str):
        raise ValueError(f"{stage_name} is given {indices!r}, but needs a list of block indices")
    count = len(_residual_block_names(stage))
    checked: list[int] = []
    for index in indices:
        is_integer = isinstance(index, Integral) and not isinstance(index, bool)
        if not is_integer or not -count <= index < count:
            raise ValueError(
                f"block index {index!r} in {stage_name}: {stage_name} has {count} blocks, so it "
                f"must be an integer from {-count} to {count - 1}"
            )
        from_start = int(index) % count
        if from_start in checked or hasattr(stage, f"nonlocal{from_start}"):
            raise ValueError(
                f"block index {index} in {stage_name}: there is a non-local block after "
                f"{stage_name}'s block {from_start} already"
            )
        checked.append(from_start)
    return checked


def _out_channels(stage_name: str, block: nn.Module) -> int:
    channels = getattr(block, "out_channels", None)
    if not isinstance(channels, int):
        raise ValueError(
            f"a {type(block).__name__} in {stage_name} does not state its number of channels: "
            "give it an integer attribute out_channels, as Detectron2's CNNBlockBase has"
        )
    return channels
