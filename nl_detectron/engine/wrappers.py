"""Modules that wrap others, such as those of ``torch.compile``, and a model without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Of torch.compile and of checkpoint_wrapper: the attribute that is the module itself.
_INNER = ("_orig_mod", "_checkpoint_wrapped_module")


def without_wrapper(module: nn.Module) -> nn.Module:
    """The module itself, if it is one that wraps another; data-parallel ones included."""
    while True:
        children = dict(module.named_children())
        inner = next((children[name] for name in _INNER if name in children), None)
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


@contextlib.contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Within the ``with``, modules below ``model`` have the names that they have unwrapped."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name not in _INNER and without_wrapper(child) is not child
    ]
    try:
        for parent, name, child in wrapped:
            setattr(parent, name, without_wrapper(child))
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)
