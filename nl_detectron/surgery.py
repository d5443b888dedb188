"""Surgery on any PyTorch model: see what its modules return, add to them, rename nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from keyword import iskeyword
from typing import Any

import torch
import torch.fx.graph
from torch import Tensor, nn

CHILD = "nonlocal"

HEIGHT, WIDTH = 3, 5
"""An image's in units of a power of 2: a feature map's width : height is no other two sizes'."""


@dataclass
class DryRun:
    """What a model was given, and what its modules returned."""

    inputs: Any
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    """Of each module's first call, in the order of the returns."""
    error: Exception | None = None
    """What ended the run before its end."""


def dry_run(model: nn.Module, inputs: Any) -> DryRun:
    """Run a model in inference, and leave everything as it was."""
    run = DryRun(inputs)

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        run.outputs.setdefault(module, output)

    with ExitStack() as stack, undisturbed(model):
        for module in model.modules():
            stack.enter_context(module.register_forward_hook(keep))
        try:
            model(inputs)
        except Exception as error:  # of any kind: the model is the user's
            run.error = error
    return run


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within the ``with``, a model is in inference; after it, all of it is as it was before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = like(model).device
    # Nothing is compiled for the sake of one image (PyTorch 2.6).
    set_stance = getattr(torch.compiler, "set_stance", lambda _: nullcontext())
    try:
        for module in modes:
            module.training = False
        random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.no_grad(), random_state, set_stance("force_eager"):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def like(model: nn.Module) -> Tensor:
    """A tensor of a model that has its device and its floating-point type."""
    tensors = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    return next(tensors, torch.zeros(()))


def is_feature_map(output: Any) -> bool:
    """Is it one tensor (B, C, H, W), by the shape of the image?"""
    if not isinstance(output, Tensor) or output.dim() != 4:
        return False
    sizes = [max(size, 0.1) for size in output.shape[1:]]
    as_image, channels_last = (
        abs(math.log(width / height * HEIGHT / WIDTH)) for height, width in (sizes[1:], sizes[:2])
    )
    return as_image <= channels_last


def describe(output: Any) -> str:
    """What a module returned, in a few words."""
    if isinstance(output, Tensor):
        size, dtype = tuple(output.shape), str(output.dtype).removeprefix("torch.")
        last = output.dim() == 4 and not is_feature_map(output)
        return f"a tensor {size} of {dtype}" + (", channels last (B, H, W, C)" if last else "")
    count = f" of {len(output)}" if isinstance(output, (list, tuple, dict)) else ""
    return f"a {type(output).__name__}{count}"


def attach(module: nn.Module, block: nn.Module) -> Callable[[], None]:
    """Apply a block, as its child ``nonlocal``, to what a module returns; gives the way back."""
    module.add_module(CHILD, block)
    hook = module.register_forward_hook(_apply_block)

    def detach() -> None:
        hook.remove()
        delattr(module, CHILD)

    return detach


def _apply_block(self: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return getattr(self, "nonlocal")(output)


def is_applied(block: nn.Module, model: nn.Module) -> bool:
    """Is a block still in a model and, where it was attached, called there?"""
    parents = [m for m in model.modules() if dict(m.named_children()).get(CHILD) is block]
    hooked = all(_apply_block in parent._forward_hooks.values() for parent in parents)
    return hooked and block in model.modules()


def insert_child(parent: nn.Module, after: str, name: str, child: nn.Module) -> None:
    """Add a child behind another one, keeping all names: ``nn.Sequential.insert`` renumbers."""
    children = dict(parent.named_children())
    following = list(children)[list(children).index(after) + 1 :]
    for other in following:
        delattr(parent, other)
    for other in [name, *following]:
        parent.add_module(other, children.get(other, child))


def look_through(module: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> nn.Module:
    """What is wanted: a module, or what it holds as its only child, and so on; else the module."""
    inner = module
    while not is_wanted(inner):
        children = list(inner.children())
        if len(children) != 1:
            return module
        inner = children[0]
    return inner


def units_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Its children by name, those of an ``nn.ModuleList`` or the like in the list's place."""
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward and "forward" not in vars(child):
            yield from units_of(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _let_fx_read_keywords() -> None:
    """
    What ``torch.export`` gives back is Python code; PyTorch writes each child's name into it as an
    attribute, unless it is a number. A keyword such as "nonlocal" has to be quoted, too.
    """
    write = getattr(torch.fx.graph, "_format_target", None)
    if write is None or write("self", CHILD).startswith("getattr"):
        return

    def write_quoted(base: str, target: str) -> str:
        for name in target.split("."):
            base = f'getattr({base}, "{name}")' if iskeyword(name) else write(base, name)
        return base

    torch.fx.graph._format_target = write_quoted


_let_fx_read_keywords()
