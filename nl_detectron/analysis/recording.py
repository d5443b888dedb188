"""Blocks of a model by name, and what they are given and give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from detectron2.modeling.roi_heads import BaseKeypointRCNNHead, BaseMaskRCNNHead
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nl_detectron.layers import AttentionBlock
from nl_detectron.modeling import nonlocal_blocks
from nl_detectron.validation import did_you_mean


def choose_blocks(model: nn.Module, names: Sequence[str] = ()) -> dict[str, AttentionBlock]:
    """
    Args:
        model: any with non-local blocks.
        names: full names, or their ends, such as ``res4.nonlocal4`` or ``nonlocal4``.

    Returns:
        Full name to block, of the named ones; of all of the model's, if ``names`` is empty.

    Raises:
        ValueError: the model has no such block, or none at all; the message lists what there is.
    """
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
    """
    Args:
        model: a model of Detectron2.
        names: as for :func:`choose_blocks`.

    Returns:
        Full name to block, of those that have a part in the scores of objects: all but the blocks
        of mask and keypoint heads, which come after the scores.

    Raises:
        ValueError: there is no such block.
    """
    chosen, heads = choose_blocks(model, names), detection_heads(model)
    scoring = {name: block for name, block in chosen.items() if not head_of(name, heads)}
    if not scoring:
        raise ValueError(f"{', '.join(chosen)} has no effect on scores: it is in a head after them")
    return scoring


def detection_heads(model: nn.Module) -> dict[str, nn.Module]:
    """
    Args:
        model: a model of Detectron2.

    Returns:
        Its mask and keypoint heads by their full names, which Detectron2 calls with (features of
        regions, instances).
    """
    heads = (BaseKeypointRCNNHead, BaseMaskRCNNHead)
    return {name: module for name, module in model.named_modules() if isinstance(module, heads)}


def head_of(name: str, heads: Iterable[str]) -> str | None:
    """
    Args:
        name: the full name of a block.
        heads: full names.

    Returns:
        The one that the block is in; None if it is in none.
    """
    return next((head for head in heads if name.startswith(f"{head}.")), None)


@contextmanager
def record_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple]]]:
    """
    Within the ``with``, keep the positional arguments of each call of each module.

    Args:
        modules: by names of any kind.

    Yields:
        Name to the arguments of each call, in order; an empty list if the module is not called.
    """
    calls: dict[str, list[tuple]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        return lambda _module, arguments: calls[name].append(arguments)

    with _removing(m.register_forward_pre_hook(keep(name)) for name, m in modules.items()):
        yield calls


@contextmanager
def record_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """
    Within the ``with``, keep the output of the last call of each module, for gradients with respect
    to it.

    Args:
        modules: by names of any kind; each returns a tensor.

    Yields:
        Name to the output; it requires a gradient.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _arguments: tuple, output: Tensor) -> None:
            outputs[name] = output if output.requires_grad else output.requires_grad_()

        return hook

    with _removing(m.register_forward_hook(keep(name)) for name, m in modules.items()):
        yield outputs


@contextmanager
def _removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within the ``with``, these hooks are there."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


def _ends_in(full_name: str, name: str) -> bool:
    return f".{full_name}".endswith(f".{name}")
