"""What stands in a checkpoint for what is no data."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class NotDataError(pickle.UnpicklingError):
    """What a file holds is well-formed, but cannot be taken as data."""


class Placeholder:
    """What stands for something that is no data: it knows its name, and does nothing."""

    def __init__(self, name: str, *, is_code: bool = False) -> None:
        self.name = name
        self.is_code = is_code

    def __call__(self, *_: Any) -> Placeholder:
        return self

    def _ignore(self, *_: Any) -> None:
        """What a pickle does with containers; nothing is kept."""

    append = extend = add = __setitem__ = _ignore

    def __repr__(self) -> str:
        return f"<{self.name}, not made>"


def placeholders_in(value: Any) -> list[Placeholder]:
    """All placeholders in a value of plain containers, each name once."""
    found: dict[str, Placeholder] = {}
    seen: set[int] = set()
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, Placeholder):
            found[item.name] = item
        elif isinstance(item, (Mapping, list, tuple, set, frozenset)) and id(item) not in seen:
            seen.add(id(item))
            rest.extend([*item, *item.values()] if isinstance(item, Mapping) else item)
    return [found[name] for name in sorted(found)]


def describe(value: Any) -> str:
    """What a value of a checkpoint is, with the names of what is no data in it."""
    if isinstance(value, Placeholder):
        return value.name
    if isinstance(value, Tensor):
        return "tensor"
    names = ", ".join(placeholder.name for placeholder in placeholders_in(value))
    return type(value).__name__ + (f" with {names}" if names else "")
