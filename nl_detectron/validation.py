"""Errors that name the thing, the offending value, the legal ones and the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Collection


class ArgumentError(ValueError):
    """
    An argument that is not legal: its name, and the rest of the message, such as "is 0, but must be
    above 0". Where arguments come from a config, it is raised again with the key for the name.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument = argument
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


def check_choice(name: str, value: object, legal: Collection[object]) -> None:
    """Raise ArgumentError for a value that is not among the legal ones; a bool is no integer."""
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
