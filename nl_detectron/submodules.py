"""Submodules, and what they hold, that are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def submodules(package: str, homes: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """
    Make a package's ``__getattr__``, which imports the submodule of the name that is asked for.
    ``homes`` has other names of the package, and the modules that they are imported from.
    """
    homes = homes or {}

    def attribute(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        full_name = f"{package}.{name}"
        if find_spec(full_name) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(full_name)

    return attribute
