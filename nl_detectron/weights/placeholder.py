"""What stands in a checkpoint for what is no data."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any


class NotDataError(pickle.UnpicklingError):
    """What a file holds is well-formed, but cannot be taken as data."""


class Placeholder:
    """What stands for something that is no data: it knows its name, and does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def why(self) -> str:
        """Why it can be no weight, as the end of a sentence."""
        if " " in self.name:  # of a kind of tensor or array, not of a function or class
            return f"is {self.name}, not a plain tensor of numbers"
        return (
            f"asks for {self.name}, which is neither a tensor, an array nor a plain container, and "
            "could run code. If you trust the file, save its state dict alone with the program "
            "that made it"
        )

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
