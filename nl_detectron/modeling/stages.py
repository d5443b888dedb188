"""A model that blocks are put into: what its modules return, and the stages of its backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

from detectron2.layers import CNNBlockBase
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.resnet import ResNet
from torch import nn

from nl_detectron.surgery import (
    HEIGHT,
    WIDTH,
    DryRun,
    describe,
    dry_run,
    is_feature_map,
    like,
    look_through,
    units_of,
)

MODULES = "MODEL.NONLOCAL.AFTER_MODULES"


class PlacementError(ValueError):
    """A model does not have the place that a block is asked for, or the block does not fit."""


class Network:
    """A model; parts of it are run, once each, when that is needed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self._runs: dict[nn.Module, DryRun] = {}

    def around(self, module: nn.Module) -> list[nn.Module]:
        """What a module is in, from the model to the module itself."""
        path = self.names[module].split(".") if module is not self.model else []
        return [self.model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]

    def run(self, module: nn.Module) -> DryRun:
        """A run of the backbone that a module is in, or else of the model."""
        part = self._part(module)
        if part not in self._runs:
            self._runs[part] = dry_run(part, _inputs(part))
        return self._runs[part]

    def channels(self, module: nn.Module, name: str, trusted: bool = False) -> int:
        """Of what a module returns. It has ``name`` in messages; ``trusted``, it knows itself."""
        sizes = (getattr(module, n, 0) for n in ("out_channels", "num_features", "num_channels"))
        known = next((size for size in sizes if size and isinstance(size, int)), 0)
        part = self._part(module)
        if known and (trusted or _is_detector(part)):
            return known
        run, what = self.run(module), f"{name} (a {type(module).__name__})"
        if module in run.outputs:
            output = run.outputs[module]
            if is_feature_map(output):
                return output.shape[1]
            raise PlacementError(
                f"{what} returns {describe(output)}, but a block needs one tensor (B, C, H, W)"
                + self._instead(module, run)
            )
        if run.error is None:
            raise PlacementError(
                f"{what} is not called when {type(part).__name__} runs, so that a block after it "
                "would do nothing, even if its weights are read"
            )
        if known:
            return known
        raise PlacementError(
            f"the channels after {what} are not known: it has no out_channels, and "
            f"{type(part).__name__} does not run on an image of zeros ({run.error})"
        )

    def _part(self, module: nn.Module) -> nn.Module:
        return next((m for m in self.around(module) if isinstance(m, Backbone)), self.model)

    def _instead(self, module: nn.Module, run: DryRun) -> str:
        """The next place that would do, no deeper in the model than this one."""
        called: list[Any] = [other for other in run.outputs if other in self.names]
        here, depth = called.index(module), self.names[module].count(".")
        for other in called[here:] + called[:here][::-1]:
            name = self.names[other]
            if name and name.count(".") <= depth and is_feature_map(run.outputs[other]):
                return f", as {name!r} returns"
        return ""


def _innermost_backbone(model: nn.Module) -> nn.Module:
    """Of those in one another, such as an FPN's ResNet."""
    inner = [m for m in model.modules() if m is not model and isinstance(m, Backbone)]
    return _innermost_backbone(inner[0]) if inner else model


def _is_detector(model: nn.Module) -> bool:
    return not isinstance(model, Backbone) and _innermost_backbone(model) is not model


def _inputs(model: nn.Module) -> Any:
    convolutions = (m for m in _innermost_backbone(model).modules() if isinstance(m, nn.Conv2d))
    channels = getattr(next(convolutions, None), "in_channels", 3)
    unit = math.lcm(32, getattr(model, "size_divisibility", 0) or 32)
    image = like(model).new_zeros(1, channels, HEIGHT * unit, WIDTH * unit)
    return [{"image": image[0]}] if _is_detector(model) else image


class Stages(NamedTuple):
    """By name, from high to low resolution."""

    body: nn.Module  # whose children they are
    in_order: dict[str, nn.Module]  # those that run their children in order, and perhaps a stem
    numbered: dict[str, nn.Module]  # without a stem
    first_stride: float = 4
    doubt: str = ""  # why these are perhaps not all, or more

    @property
    def are_detectron2s(self) -> bool:
        """Are they those of Detectron2's own ResNet, which tells its stages and channels?"""
        return isinstance(self.body, ResNet) and type(self.body).forward is ResNet.forward

    def by_name(self, lists: Sequence[Sequence[int]]) -> dict[str, Sequence[int]]:
        """Lists by position to lists by name; refused where the position is in doubt."""
        if not self.in_order:
            return {}
        names, doubt = list(self.numbered), self.doubt
        if not doubt and len(names) != len(lists) and (len(names) > 4 or self.first_stride > 4):
            doubt = f"there are {len(lists)} lists for its {len(names)} stages ({', '.join(names)})"
        if doubt:
            raise PlacementError(
                f"of {type(self.body).__name__} the stages cannot be numbered, as {doubt}: name "
                f'the stage, as in {{"{[*self.in_order][-1]}": [-2]}}, or the module ({MODULES})'
            )
        if surplus := [n for n, indices in enumerate(lists, 1) if indices and n > len(names)]:
            raise PlacementError(
                f"it asks for blocks in stage number {surplus[0]}, but the backbone has "
                f"{len(names)}: {', '.join(names)}"
            )
        return dict(zip(names, lists))


def find_stages(model: nn.Module) -> dict[str, nn.Module]:
    """
    The stages of a model's innermost backbone that run their children in order, by name, from high
    to low resolution, without a stem; empty if there are none.
    """
    return stages_of(Network(model)).numbered


def stages_of(network: Network) -> Stages:
    """What comes before the stages, such as a stem, is told by strides and by what is returned."""
    body = _find_body(network.model)
    units, in_order = dict(units_of(body)), _in_order(body)
    stages = Stages(body, in_order, in_order)
    if stages.are_detectron2s:
        lost = [name for name in body.stage_names if name not in in_order]
        return stages._replace(doubt=_doubt(units, lost, "does not run its blocks in order"))
    run, names = network.run(body), {unit: name for name, unit in units.items()}
    maps = {unit: map_ for unit, map_ in run.outputs.items() if unit in names}
    maps = {unit: map_ for unit, map_ in maps.items() if is_feature_map(map_)}
    returned = _identities(run.outputs.get(body))
    outputs = [unit for unit, map_ in maps.items() if id(map_) in returned]
    if not outputs:
        why = f" ({run.error})" if run.error else ""
        return stages._replace(doubt=f"no child returns what it returns{why}")

    strides = {unit: run.inputs.shape[2] / max(map_.shape[2], 1) for unit, map_ in maps.items()}
    last = {stride: unit for unit, stride in strides.items()}
    # res2, whether it is returned or not: what has its stride before it is a stem.
    res2 = last.get(min((stride for stride in last if stride > 3), default=0), outputs[0])
    called = list(maps)
    called = called[min(called.index(outputs[0]), called.index(res2)) :]
    found = {names[unit]: in_order[names[unit]] for unit in called if names[unit] in in_order}
    sure = [names[unit] for unit in called if unit in outputs or unit in last.values()]
    # A stage whose blocks are called one by one, from outside, is not called itself.
    one_by_one = [n for n, stage in in_order.items() if stage not in run.outputs]
    one_by_one = [n for n in one_by_one if any(b in run.outputs for b in in_order[n].children())]
    lost = [name for name in sure if name not in found] + one_by_one
    doubt = _doubt(units, lost, "does not run its blocks in order")
    doubt = doubt or _doubt(units, [name for name in found if name not in sure], "may be none")
    # Such as ConvNeXt's first stage, whose blocks alone are in an nn.Sequential.
    backbone = _identities(run.outputs.get(_innermost_backbone(network.model)))
    if not doubt and backbone & returned and backbone - returned:
        doubt = f"it has only a part of {len(backbone)} that are returned"
    return Stages(body, in_order, found, strides[called[0]], doubt)


def _identities(output: Any) -> set[int]:
    output = list(output.values()) if isinstance(output, dict) else output
    return {id(tensor) for tensor in (output if isinstance(output, (list, tuple)) else [output])}


def _doubt(units: dict[str, nn.Module], names: Sequence[str], why: str) -> str:
    return f"{names[0]} (a {type(units[names[0]]).__name__}) {why}" if names else ""


def _find_body(model: nn.Module) -> Any:
    """The network with stages in the only innermost backbone that has one."""
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    innermost = [b for b in backbones if _innermost_backbone(b) is b] or [model]
    # Others, such as the layers of a BiFPN, are backbones without stages.
    bodies = [body for backbone in innermost if _in_order(body := _first_in_order(backbone))]
    if len(bodies) > 1:
        raise PlacementError(f"{type(model).__name__} has several backbones: give one of them")
    return bodies[0] if bodies else innermost[0]


def _first_in_order(backbone: nn.Module) -> nn.Module:
    """The first network in it, by breadth, with children that run in order; itself if none has."""
    level = [backbone]
    while level:
        for module in level:
            if _in_order(module):
                return module
        level = [child for module in level for _, child in units_of(module)]
    return backbone


def _in_order(body: nn.Module) -> dict[str, nn.Module]:
    inner = {name: look_through(unit, _runs_in_order) for name, unit in units_of(body)}
    return {name: stage for name, stage in inner.items() if _runs_in_order(stage)}


def _runs_in_order(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)
    # Detectron2's contract for the blocks of a stage; RegNet's stages are made so.
    children = [look_through(child, _is_block) for child in module.children()]
    return bool(children) and not _is_block(module) and all(map(_is_block, children))


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, CNNBlockBase)


def checked_indices(
    indices: Sequence[int], stage_name: str, stage: nn.Module, blocks: Sequence[str]
) -> list[int]:
    """Indices into a stage's blocks, from its start."""
    if not isinstance(indices, Sequence) or isinstance(indices, str):
        raise PlacementError(
            f"{stage_name} is given {indices!r}, but needs a list of block indices, such as [-2]"
        )
    count = len(blocks)
    checked: list[int] = []
    for index in indices:
        is_integer = isinstance(index, Integral) and not isinstance(index, bool)
        if not is_integer or not -count <= index < count:
            raise PlacementError(
                f"block index {index!r} in {stage_name}: {stage_name} has {count} blocks, so it "
                f"must be an integer from {-count} to {count - 1}"
            )
        from_start = int(index) % count
        block = stage.get_submodule(blocks[from_start])
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
