"""Submodules that are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def submodules(package: str) -> Callable[[str], ModuleType]:
    """A package's ``__getattr__``: it imports the submodule of that name."""

    def submodule(name: str) -> ModuleType:
        full_name = f"{package}.{name}"
        if find_spec(full_name) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(full_name)

    return submodule
