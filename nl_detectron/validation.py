"""Errors that name the thing, the offending value, the legal ones and the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

import yaml

_MOST_YAML_VALUES = 100_000


class ArgumentError(ValueError):
    """
    An argument that is not legal. Where arguments come from a config, the error is raised again
    with the key in the place of the argument's name.

    Attributes:
        argument: its name.
        problem: the rest of the message, such as "is 0, but must be above 0".
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument = argument
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


def check_choice(name: str, value: object, legal: Collection[object]) -> None:
    """
    Refuse a value that is not among the legal ones.

    Args:
        name: the argument's or the setting's name, as the user writes it.
        value: the value.
        legal: all legal ones; a bool is not an integer here.

    Raises:
        ArgumentError: ``value`` is not among ``legal``.
    """
    # "1 == True" must not let a bool through where a number is meant, nor the reverse.
    if any(value == choice and type(value) is type(choice) for choice in legal):
        return
    choices = ", ".join(repr(choice) for choice in legal)
    hint = did_you_mean(value, legal)
    raise ArgumentError(name, f"is {value!r}, but must be one of {choices}{hint}")


def did_you_mean(value: object, legal: Collection[object]) -> str:
    """``; did you mean 'res4'?`` for a string close to a legal one, else the empty string."""
    words = [choice for choice in legal if isinstance(choice, str)]
    near = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def check_yaml_size(text: str) -> None:
    """
    Check that what a YAML text stands for, with all its aliases written out, is not huge: some 300
    bytes of aliases of aliases would take all memory.

    Args:
        text: of a YAML file.

    Raises:
        ValueError: there are more than 100,000 values.
    """
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_YAML_VALUES  # until it is known: an alias may be of itself
            values = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                values = [part for pair in values for part in pair]
            sizes[id(node)] = 1 + sum(map(size, values))
        return sizes[id(node)]

    if size(yaml.compose(text, yaml.SafeLoader)) > _MOST_YAML_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_YAML_VALUES:,} values")
