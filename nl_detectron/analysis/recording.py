"""Blocks of a model by name, and what they are given and give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead, BaseMaskRCNNHead
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nl_detectron.analysis.placement import grid_stride
from nl_detectron.layers import AttentionBlock
from nl_detectron.modeling import nonlocal_blocks
from nl_detectron.validation import did_you_mean


def choose_blocks(model: nn.Module, names: Sequence[str] = ()) -> dict[str, AttentionBlock]:
    """Full name to block, of those with these full names or ends of names, such as ``nonlocal4``,
    or of all. ValueError: the model has no such block, or none at all."""
    blocks = nonlocal_blocks(model, AttentionBlock)
    if not blocks:
        raise ValueError("the model has no non-local blocks")
    for name in names:
        if not any(_ends_in(full_name, name) for full_name in blocks):
            raise ValueError(
                f"the model has no non-local block {name!r}, but {', '.join(blocks)}"
                f"{did_you_mean(name, blocks)}"
            )
    return {
        full_name: block
        for full_name, block in blocks.items()
        if not names or any(_ends_in(full_name, name) for name in names)
    }


def scoring_blocks(model: nn.Module, names: Sequence[str] = ()) -> dict[str, AttentionBlock]:
    """:func:`choose_blocks`, less those of mask and keypoint heads, which come after the scores.
    ValueError: none is left."""
    chosen, heads = choose_blocks(model, names), detection_heads(model)
    scoring = {name: block for name, block in chosen.items() if not head_of(name, heads)}
    if not scoring:
        raise ValueError(f"{', '.join(chosen)} has no effect on scores: it is in a head after them")
    return scoring


def detection_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Mask and keypoint heads by full name; they are called with features of regions, instances."""
    heads = (BaseKeypointRCNNHead, BaseMaskRCNNHead)
    return {name: module for name, module in model.named_modules() if isinstance(module, heads)}


def head_of(name: str, heads: Iterable[str]) -> str | None:
    """The one of ``heads``, full names, that the block ``name`` is in; None if it is in none."""
    return next((head for head in heads if name.startswith(f"{head}.")), None)


@contextmanager
def record_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple]]]:
    """Within the ``with``, keep the positional arguments of each call of a module by its name."""
    calls: dict[str, list[tuple]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        return lambda _module, arguments: calls[name].append(arguments)

    with _removing(m.register_forward_pre_hook(keep(name)) for name, m in modules.items()):
        yield calls


@contextmanager
def record_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within the ``with``, keep the last output of each module by its name, for gradients."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _arguments: tuple, output: Tensor) -> None:
            outputs[name] = output if output.requires_grad else output.requires_grad_()

        return hook

    with _removing(m.register_forward_hook(keep(name)) for name, m in modules.items()):
        yield outputs


def input_and_boxes(
    name: str, calls: Mapping[str, list[tuple]], heads: Iterable[str], min_score: float
) -> tuple[Tensor, Tensor]:
    """
    The block's input (N, C, rows, columns), and (N, 4) what it covers of the model's input, in
    pixels: in a head, the boxes of the N objects with this score at least. ValueError: the block
    does not run once, or its input has no place in the image.
    """
    x = _only_input(name, calls[name])
    head = head_of(name, heads)
    if head is None:
        return x, _box_of_grid(name, x, calls["backbone"][0][0].shape[-2:])
    ((_, (instances,)),) = calls[head]
    confident = instances.scores >= min_score
    return x[confident], instances.pred_boxes.tensor[confident]


@contextmanager
def _removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


def _only_input(name: str, calls: list[tuple]) -> Tensor:
    if len(calls) != 1:
        raise ValueError(
            f"the block {name} runs {len(calls)} times for an image; attention is shown for blocks "
            "that run once"
        )
    return calls[0][0].detach()


def _box_of_grid(name: str, x: Tensor, input_size: tuple[int, int]) -> Tensor:
    """(1, 4): what the grid of a feature map covers of the model's input, in pixels."""
    if x.dim() != 4 or x.shape[0] != 1:
        raise ValueError(
            f"the block {name} is given features of shape {tuple(x.shape)}; attention is shown "
            "for blocks of the backbone and of mask and keypoint heads"
        )
    rows, columns = x.shape[2:]
    stride = grid_stride(input_size, (rows, columns))
    return torch.tensor([[0, 0, columns * stride, rows * stride]])


def _ends_in(full_name: str, name: str) -> bool:
    return f".{full_name}".endswith(f".{name}")
