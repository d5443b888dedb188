"""What modules of a model are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


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

    handles = [m.register_forward_pre_hook(keep(name)) for name, m in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
