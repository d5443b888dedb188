"""The places in a model that blocks are asked for: behind the blocks of a stage, or any modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from numbers import Integral
from typing import Any, cast

from torch import nn

from nl_detectron.modeling.blocks import is_nonlocal_block, nonlocal_blocks
from nl_detectron.modeling.network import Network, PlacementError
from nl_detectron.modeling.stages import Stages, stages_of
from nl_detectron.surgery import CHILD, attach, insert_child, units_of
from nl_detectron.validation import did_you_mean

_MODULES = "MODEL.NONLOCAL.AFTER_MODULES"
Places = Mapping[str, Sequence[int]] | Sequence[Sequence[int]] | Sequence[str]

# What PyTorch's wrappers (compile, checkpoint, FSDP) call the module that they hold.
_WRAPPED = re.compile(r"(^|\.)_(orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)(?=\.|$)")


@dataclass(frozen=True)
class Place:
    """Where a block comes: behind a child of ``parent``, or after all that the parent does."""

    name: str  # the block's, such as "res4.nonlocal4"
    after: str  # the name of the module that it comes after
    parent: nn.Module
    behind: str | None
    owner: nn.Module  # whose device, type, mode and frozen state the block takes
    channels: int

    def put(self, block: nn.Module) -> Callable[[], None]:
        """Put a block there; gives what takes it away again."""
        if self.behind is None:
            return attach(self.parent, block)
        own_name = self.name.rpartition(".")[2]
        insert_child(self.parent, self.behind, own_name, block)
        return partial(delattr, self.parent, own_name)


def find_places(model: nn.Module, places: Places) -> list[Place]:
    """Those that are asked for; for ``places`` see :func:`nl_detectron.insert_blocks`."""
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
        return _in_stages(network, stages, _by_name(stages, cast(Any, places)))
    found = {place.parent: place for name in names for place in _after_modules(network, name)}
    return list(found.values())


def _after_modules(network: Network, pattern: str) -> Iterator[Place]:
    """After each module that the pattern names; of modules in one another, after the outermost."""
    model = network.model
    all_names = (raw for raw, _ in model.named_modules(remove_duplicate=False) if raw)
    names = {raw: _WRAPPED.sub("", raw).lstrip(".") for raw in all_names}
    blocks = tuple(f"{block}." for block in nonlocal_blocks(model))
    names = {raw: name for raw, name in names.items() if not f"{raw}.".startswith(blocks)}
    found = [raw for raw, name in names.items() if fnmatchcase(name, pattern) or raw == pattern]
    outermost = [raw for raw in found if not any(raw.startswith(f"{o}.") for o in found)]
    if not outermost:
        children = ", ".join(name for name, _ in units_of(model))
        raise PlacementError(
            f"{type(model).__name__} has no module {pattern!r}, nor one that fits it as a pattern"
            f"{did_you_mean(pattern, list(names.values()))} (its children are {children})"
        )
    for raw in outermost:
        module, name = model.get_submodule(raw), names[raw]
        while _WRAPPED.fullmatch(held := next((n for n, _ in module.named_children()), "")):
            module = module.get_submodule(held)
        if hasattr(module, CHILD):
            raise PlacementError(f"there is a block after {name} already")
        around = reversed(network.around(module))
        owner = next((m for m in around if next(m.parameters(), None) is not None), model)
        yield Place(f"{name}.{CHILD}", name, module, None, owner, network.channels(module, name))


def _by_name(stages: Stages, lists: Sequence[Sequence[int]]) -> dict[str, Sequence[int]]:
    """Lists by position to lists by the stage's name; refused where the position is in doubt."""
    if not stages.in_order:
        return {}
    names, doubt = list(stages.numbered), stages.doubt
    if not doubt and len(names) != len(lists) and (len(names) > 4 or stages.first_stride > 4):
        doubt = f"there are {len(lists)} lists for its {len(names)} stages ({', '.join(names)})"
    if doubt:
        raise PlacementError(
            f"of {type(stages.body).__name__} the stages cannot be numbered, as {doubt}: name the "
            f'stage, as in {{"{[*stages.in_order][-1]}": [-2]}}, or the module ({_MODULES})'
        )
    if surplus := [n for n, indices in enumerate(lists, 1) if indices and n > len(names)]:
        raise PlacementError(
            f"it asks for blocks in stage number {surplus[0]}, but the backbone has "
            f"{len(names)}: {', '.join(names)}"
        )
    return dict(zip(names, lists))


def _in_stages(
    network: Network, stages: Stages, after_blocks: Mapping[str, Sequence[int]]
) -> list[Place]:
    units = dict(units_of(stages.body))
    if not stages.in_order:
        raise PlacementError(
            f"{type(stages.body).__name__} has no stages for non-local blocks: none of its "
            f"children ({', '.join(units)}) is an nn.Sequential or made of Detectron2's "
            f"CNNBlockBase; name the module that a block comes after ({_MODULES})"
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
        checked = _check_indices(name, stage, indices)
        if name not in stages.in_order or (checked and not _takes_in(network, stages, stage)):
            example = "".join(f', as in ["{name}.{n}"]' for n in _residual_block_names(stage)[-1:])
            raise PlacementError(
                f"{name} (a {type(stage).__name__}) would not run a block that is put into it: "
                f"name the module that the block comes after ({_MODULES}){example}"
            )
        for index in checked:
            child = _residual_block_names(stage)[index]
            after, module = f"{name}.{child}", stage.get_submodule(child)
            channels = network.channels(module, after, trusted=stages.are_detectron2s)
            places.append(Place(f"{name}.nonlocal{index}", after, stage, child, stage, channels))
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


def _residual_block_names(stage: nn.Module) -> list[str]:
    return [name for name, child in stage.named_children() if not is_nonlocal_block(name, child)]
