"""What a conversion hands back: the tensors, the settings they need, and a row for every tensor."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import Tensor


class ConversionError(ValueError):
    """The weights cannot be converted without changing what they compute; the message says why."""


@dataclass(frozen=True)
class Row:
    """One tensor. ``source`` is empty for one that was made up, ``target`` for one left out."""

    source: str
    target: str
    shape: tuple[int, ...]
    note: str = ""

    @property
    def outcome(self) -> str:
        if not self.target:
            return f"left out: {self.note}"
        return f"done: {self.note}" if self.note else "done"


@dataclass
class Conversion:
    """
    Attributes:
        family: the implementation that the weights came from.
        state_dict: the converted tensors, by their new names.
        settings: the config under which they compute what they computed before; for another target
            than this package, the arguments that its block takes, by block.
        rows: what became of every tensor of the source.
        notes: what a reader has to know beyond the rows.
    """

    family: str
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, source: str, target: str, tensor: Tensor, note: str = "") -> None:
        """
        Raises:
            ConversionError: another tensor has got the name ``target``.
        """
        if target in self.state_dict:
            raise ConversionError(f"two tensors would become {target}; the second is {source}")
        self.state_dict[target] = tensor
        self.rows.append(Row(source, target, tuple(tensor.shape), note))

    def leave_out(self, source: str, value: Any, why: str) -> None:
        self.rows.append(Row(source, "", tuple(getattr(value, "shape", ())), why))

    def table(self) -> str:
        """All rows, a line each, in columns: source, target, shape, what became of it."""
        head = ("source", "target", "shape", "")
        lines = [head] + [
            (r.source or "-", r.target or "-", "x".join(map(str, r.shape)) or "-", r.outcome)
            for r in self.rows
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            "  ".join([*(f"{cell:<{w}}" for cell, w in zip(line, widths)), line[3]]).rstrip()
            for line in lines
        )

    def to_yaml(self) -> str:
        """The settings, below the notes as comments."""
        notes = [textwrap.wrap(" ".join(note.split()), width=98) for note in self.notes]
        comments = [f"# {line}\n" for note in notes for line in note]
        text = yaml.safe_dump(self.settings, sort_keys=False, default_flow_style=None)
        return "".join(comments) + text
