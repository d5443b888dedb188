"""The result of a conversion: the tensors, the settings they need, and a row for every tensor."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

import yaml
from tabulate import tabulate
from torch import Tensor


class ConversionError(ValueError):
    """The weights cannot be converted without changing what they compute; the message says why."""


@dataclass(frozen=True)
class Row:
    """
    What became of one tensor.

    Attributes:
        source: its name in the file; empty for a tensor that the file does not have.
        target: its new name; empty for a tensor that is left out.
        shape: its new shape, or that in the file if it is left out.
        note: how it was changed, or why it is left out.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    note: str = ""

    @property
    def outcome(self) -> str:
        """The last column of the table: "done" or "left out", with the note."""
        outcome = "done" if self.target else "left out"
        return f"{outcome}: {self.note}" if self.note or not self.target else outcome


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
        Args:
            source: the tensor's name in the file, or "".
            target: its new name.
            tensor: its new value.
            note: how it was changed.

        Raises:
            ConversionError: another tensor has the name ``target`` already.
        """
        if target in self.state_dict:
            raise ConversionError(f"two tensors would become {target}; the second is {source}")
        self.state_dict[target] = tensor
        self.rows.append(Row(source, target, tuple(tensor.shape), note))

    def leave_out(self, source: str, value: Any, why: str) -> None:
        """
        Args:
            source: the name in the file.
            value: what has this name there.
            why: the reason, for the table.
        """
        self.rows.append(Row(source, "", tuple(getattr(value, "shape", ())), why))

    def table(self) -> str:
        """All rows, a line each, in columns: source, target, shape, what became of it."""
        lines = [
            (r.source or "-", r.target or "-", "x".join(map(str, r.shape)) or "-", r.outcome)
            for r in self.rows
        ]
        head = ("source", "target", "shape", "")
        return tabulate([head, *lines], tablefmt="plain", disable_numparse=True)

    def to_yaml(self) -> str:
        """The settings, below the notes as comments."""
        notes = [textwrap.wrap(" ".join(note.split()), width=98) for note in self.notes]
        comments = [f"# {line}\n" for note in notes for line in note]
        text = yaml.safe_dump(self.settings, sort_keys=False, default_flow_style=None)
        return "".join(comments) + text
