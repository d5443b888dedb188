"""The stages of a backbone, from high to low resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.layers import CNNBlockBase
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.resnet import ResNet
from torch import nn

from nl_detectron.modeling.network import Network, PlacementError, innermost_backbone
from nl_detectron.surgery import is_feature_map, look_through, units_of


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


def find_stages(model: nn.Module) -> dict[str, nn.Module]:
    """
    Args:
        model: a backbone, or what has one inside.

    Returns:
        The stages of the innermost backbone that run their children in order, by name, from high to
        low resolution, without a stem; empty if there are none.
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
    run = network.run(body)
    maps = {unit: run.outputs[unit] for unit in run.outputs if unit in units.values()}
    maps = {unit: output for unit, output in maps.items() if is_feature_map(output)}
    returned = _identities(run.outputs.get(body))
    outputs = [unit for unit, output in maps.items() if id(output) in returned]
    if not outputs:
        why = f" ({run.error})" if run.error else ""
        return stages._replace(doubt=f"no child returns what it returns{why}")

    strides = {unit: run.inputs.shape[2] / max(map_.shape[2], 1) for unit, map_ in maps.items()}
    last = {stride: unit for unit, stride in strides.items()}
    # res2, whether it is returned or not: what has its stride before it is a stem.
    res2 = last.get(min((stride for stride in last if stride > 3), default=0), outputs[0])
    called = list(maps)
    called = called[min(called.index(outputs[0]), called.index(res2)) :]
    names = {unit: name for name, unit in units.items()}
    found = {names[unit]: in_order[names[unit]] for unit in called if names[unit] in in_order}
    sure = [names[unit] for unit in called if unit in outputs or unit in last.values()]
    # A stage whose blocks are called one by one, from outside, is not called itself.
    one_by_one = [n for n, stage in in_order.items() if stage not in run.outputs]
    one_by_one = [n for n in one_by_one if any(b in run.outputs for b in in_order[n].children())]
    lost = [name for name in sure if name not in found] + one_by_one
    doubt = _doubt(units, lost, "does not run its blocks in order")
    doubt = doubt or _doubt(units, [name for name in found if name not in sure], "may be none")
    # Such as ConvNeXt's first stage, whose blocks alone are in an nn.Sequential.
    backbone = _identities(run.outputs.get(innermost_backbone(network.model)))
    if not doubt and backbone & returned and backbone - returned:
        doubt = f"it has only a part of {len(backbone)} that are returned"
    return Stages(body, in_order, found, strides[called[0]], doubt)


def _identities(output: Any) -> set[int]:
    output = list(output.values()) if isinstance(output, dict) else output
    return {id(tensor) for tensor in (output if isinstance(output, (list, tuple)) else [output])}


def _doubt(units: dict[str, nn.Module], names: Sequence[str], why: str) -> str:
    return f"{names[0]} (a {type(units[names[0]]).__name__}) {why}" if names else ""


def _find_body(model: nn.Module) -> Any:
    """In the innermost backbone, the first network, by breadth, with children that run in order."""
    level = [body := innermost_backbone(model)]
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    if not all(body in backbone.modules() for backbone in backbones):
        raise PlacementError(f"{type(model).__name__} has several backbones: give one of them")
    while level:
        for module in level:
            if _in_order(module):
                return module
        level = [child for module in level for _, child in units_of(module)]
    return body


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
