"""Putting blocks into a model that is already built, without renaming anything in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nl_detectron.layers import NonLocalBlock
from nl_detectron.modeling.blocks import is_nonlocal_block, nonlocal_blocks
from nl_detectron.modeling.bottleneck import attach_to_sum
from nl_detectron.modeling.first_step import Inserted, announce_at_first_step
from nl_detectron.modeling.stages import (
    MODULES,
    Network,
    PlacementError,
    Stages,
    checked_indices,
    stages_of,
)
from nl_detectron.surgery import (
    CHILD,
    HEIGHT,
    WIDTH,
    attach,
    describe,
    insert_child,
    like,
    undisturbed,
    units_of,
)
from nl_detectron.validation import did_you_mean

logger = logging.getLogger(__name__)

# What PyTorch's wrappers (compile, checkpoint, FSDP) call the module that they hold.
_WRAPPED = re.compile(r"(^|\.)_(orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)(?=\.|$)")

Model = TypeVar("Model", bound=nn.Module)
Places = Mapping[str, Sequence[int]] | Sequence[Sequence[int]] | Sequence[str]


def insert_nonlocal_blocks(module: Model, places: Places, **block_options: Any) -> Model:
    """
    Put non-local blocks into a model, in place: :func:`insert_blocks` with :class:`NonLocalBlock`.

    Args:
        module, places: see :func:`insert_blocks`.
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
              one another that fit a pattern, a block comes after the outermost. A pattern that ends
              in ``.sum`` means the sum of Detectron2's bottlenecks, before their last ReLU.
        make_block: from a number of channels to a block, any module that keeps shape and dtype.

    Returns:
        The same module.

    Raises:
        PlacementError: a ValueError; there is no such place, or a block changes shape or dtype. The
            module is then as it was, as after any error of ``make_block``.
    """
    announce_at_first_step(module, put_blocks(module, places, make_block))
    return module


def put_blocks(
    module: nn.Module, places: Places, make_block: Callable[[int], nn.Module]
) -> list[Inserted]:
    """:func:`insert_blocks`, for the caller to announce."""
    if isinstance(make_block, nn.Module):
        raise PlacementError(
            f"make_block is a {type(make_block).__name__}, but must make one of a number of "
            "channels, as its class or a function does: each place has a block of its own"
        )
    if any(isinstance(inner, DistributedDataParallel) for inner in module.modules()):
        raise PlacementError("put blocks in before DistributedDataParallel, which would miss them")
    planned = [
        (place, *_fitted(make_block(place.channels), place))
        for place in _find_places(module, places)
    ]
    with ExitStack() as undo:  # everything is legal; only now change the model
        for place, block, _ in planned:
            undo.callback(place.put(block))
        _report(planned)
        undo.pop_all()
    return [(place.name, block, place.channels) for place, block, _ in planned]


def _report(planned: list[tuple[_Place, nn.Module, bool]]) -> None:
    """A line of all that learn, and one of all that are frozen."""
    lines: dict[bool, list[str]] = {False: [], True: []}
    for place, block, is_frozen in planned:
        text = f"{type(block).__name__} {place.name} after {place.after}"
        lines[is_frozen].append(f"{text} ({place.channels} channels)")
    if lines[False]:
        logger.info(", ".join(lines[False]))
    if lines[True]:
        logger.warning(f"{', '.join(lines[True])}: frozen, as its stage is; it will not learn")


class _Place(NamedTuple):
    """Where a block comes: behind a child of ``parent``, or after all that the parent does."""

    name: str  # the block's, such as "res4.nonlocal4"
    after: str  # the name of the module that it comes after
    parent: nn.Module
    behind: str | None
    owner: nn.Module  # whose device, type, mode and frozen state the block takes
    channels: int
    is_sum: bool = False  # before the last ReLU of the parent, a bottleneck

    def put(self, block: nn.Module) -> Callable[[], None]:
        """Gives what takes the block away again."""
        if self.is_sum:
            return attach_to_sum(self.parent, block)
        if self.behind is None:
            return attach(self.parent, block)
        own_name = self.name.rpartition(".")[2]
        insert_child(self.parent, self.behind, own_name, block)
        return partial(delattr, self.parent, own_name)


def _fitted(block: nn.Module, place: _Place) -> tuple[nn.Module, bool]:
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


def _find_places(model: nn.Module, places: Places) -> list[_Place]:
    network = Network(model)
    if isinstance(places, Mapping):
        return _in_stages(network, stages_of(network), places)
    is_list = isinstance(places, Sequence) and not isinstance(places, str)
    names = [place for place in places if isinstance(place, str)] if is_list else []
    if not is_list or 0 < len(names) < len(places):
        raise PlacementError(
            f"places is {places!r}, but must be stages with block indices, such as "
            '{"res4": [-2]}, a list of block indices for each stage, or a list of names of modules'
        )
    if not names and any(places):
        stages = stages_of(network)
        return _in_stages(network, stages, stages.by_name(cast(Any, places)))
    after = [place for name in names for place in _after_modules(network, name)]
    found = {(place.parent, place.is_sum): place for place in after}
    return list(found.values())


def _after_modules(network: Network, pattern: str) -> Iterator[_Place]:
    """After each module that the pattern names; of modules in one another, after the outermost."""
    model = network.model
    all_names = (raw for raw, _ in model.named_modules(remove_duplicate=False) if raw)
    names = {raw: _WRAPPED.sub("", raw).lstrip(".") for raw in all_names}
    blocks = tuple(f"{block}." for block in nonlocal_blocks(model))
    names = {raw: name for raw, name in names.items() if not f"{raw}.".startswith(blocks)}
    units = [raw for raw in names if type(model.get_submodule(raw)) is BottleneckBlock]
    sums = {f"{raw}.sum": raw for raw in units if pattern.endswith(".sum")}
    names |= {place: f"{names[raw]}.sum" for place, raw in sums.items()}
    found = [raw for raw, name in names.items() if fnmatchcase(name, pattern) or raw == pattern]
    outermost = [raw for raw in found if not any(raw.startswith(f"{o}.") for o in found)]
    if not outermost:
        children = ", ".join(name for name, _ in units_of(model))
        raise PlacementError(
            f"{type(model).__name__} has no module {pattern!r}, nor one that fits it as a pattern"
            f"{did_you_mean(pattern, list(names.values()))} (its children are {children})"
        )
    for raw in outermost:
        module, name = model.get_submodule(sums.get(raw, raw)), names[raw]
        while _WRAPPED.fullmatch(held := next((n for n, _ in module.named_children()), "")):
            module = module.get_submodule(held)
        if raw not in sums and hasattr(module, CHILD):
            raise PlacementError(f"there is a block after {name} already")
        around = reversed(network.around(module))
        owner = next((m for m in around if next(m.parameters(), None) is not None), model)
        channels = network.channels(module, name)
        yield _Place(f"{name}.{CHILD}", name, module, None, owner, channels, raw in sums)


def _in_stages(
    network: Network, stages: Stages, after_blocks: Mapping[str, Sequence[int]]
) -> list[_Place]:
    units = dict(units_of(stages.body))
    if not stages.in_order:
        raise PlacementError(
            f"{type(stages.body).__name__} has no stages for non-local blocks: none of its "
            f"children ({', '.join(units)}) is an nn.Sequential or made of Detectron2's "
            f"CNNBlockBase; name the module that a block comes after ({MODULES})"
        )
    places = []
    for name, indices in after_blocks.items():
        if name not in units:
            legal = list(stages.in_order)
            raise PlacementError(
                f"stage is {name!r}, but must be one of {', '.join(map(repr, legal))}"
                f"{did_you_mean(name, legal)}"
            )
        stage = stages.in_order.get(name, units[name])
        blocks = [n for n, child in stage.named_children() if not is_nonlocal_block(n, child)]
        checked = checked_indices(indices, name, stage, blocks)
        if name not in stages.in_order or (checked and not _takes_in(network, stages, stage)):
            example = f', as in ["{name}.{blocks[-1]}"]' if blocks else ""
            raise PlacementError(
                f"{name} (a {type(stage).__name__}) would not run a block that is put into it: "
                f"name the module that the block comes after ({MODULES}){example}"
            )
        for index in checked:
            after, module = f"{name}.{blocks[index]}", stage.get_submodule(blocks[index])
            channels = network.channels(module, after, trusted=stages.are_detectron2s)
            place = f"{name}.nonlocal{index}", after, stage, blocks[index], stage, channels
            places.append(_Place(*place))
    return places


def _takes_in(network: Network, stages: Stages, stage: nn.Module) -> bool:
    """Would it run one more child?"""
    if stages.are_detectron2s:
        return True
    run = network.run(stage)
    if isinstance(stage, nn.Sequential) and (run.error or stage in run.outputs):
        return True
    stage.add_module("nonlocal", probe := nn.Identity())
    try:
        return probe in Network(network.model).run(stage).outputs
    finally:
        delattr(stage, "nonlocal")
