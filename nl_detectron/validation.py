"""Errors that name the thing, the offending value, the legal ones and the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def check_choice(name: str, value: object, legal: Collection[object]) -> None:
    """
    Args:
        name: what the value is of, as the user knows it.
        value: the value.
        legal: all legal ones; a bool is not an integer here.

    Raises:
        ValueError: ``value`` is not among ``legal``.
    """
    # "1 == True" must not let a bool through where a number is meant, nor the reverse.
    if any(value == choice and type(value) is type(choice) for choice in legal):
        return
    choices = ", ".join(repr(choice) for choice in legal)
    raise ValueError(
        f"{name} is {value!r}, but must be one of {choices}{did_you_mean(value, legal)}"
    )


def did_you_mean(value: object, legal: Collection[object]) -> str:
    """
    Args:
        value: what somebody wrote.
        legal: what is legal.

    Returns:
        ``; did you mean 'res4'?`` for a string close to a legal one, else the empty string.
    """
    words = [choice for choice in legal if isinstance(choice, str)]
    near = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
