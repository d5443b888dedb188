"""What goes into a conversion beside the weights, and what comes out of it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from tabulate import tabulate
from torch import Tensor

from nl_detectron.validation import check_choice


class ConversionError(ValueError):
    """The weights cannot be converted without changing what they compute; the message says why."""


@dataclass(frozen=True)
class Options:
    """
    What the caller of :func:`convert` knows about the weights and the file does not tell, its
    keywords. None is "not given".

    Attributes:
        pairwise, scale, subsample: what the source computes, in the words of
            :class:`NonLocalBlock`.
        norm: its norm, where the file has one without running statistics ("GN" or "LN"), or
            another of Detectron2's batch norms than "BN".
        norm_eps: epsilon of the source's batch norm, if it is not the implementation's default.
        temperature: what the logits of "disentangled" are divided by, if it is not 0.05.
        dims: 1, 2 or 3; by default 2 for "nl_detectron", 3 for "pytorchvideo" and the source's for
            "mmcv".
        rename: the source's name of a block, or of what it is in, to the target's; "" is the root.
        detector_config: the text of mmdetection's config, for a detector whose file has none.
    """

    pairwise: str | None = None
    scale: bool | None = None
    subsample: str | None = None
    norm: str | None = None
    norm_eps: float | None = None
    temperature: float | None = None
    dims: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    detector_config: str | None = None

    def __post_init__(self) -> None:
        check_choice("dims", self.dims, (None, 1, 2, 3))
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature!r}, but must be a number above 0")


@dataclass(frozen=True)
class ConvertedTensor:
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
    The converted weights and their report.

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
    rows: list[ConvertedTensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, source: str, target: str, tensor: Tensor, note: str = "") -> None:
        """Take a tensor in, ``source`` in the file or "", under a name that is not taken."""
        if target in self.state_dict:
            raise ConversionError(f"two tensors would become {target}; the second is {source}")
        self.state_dict[target] = tensor
        self.rows.append(ConvertedTensor(source, target, tuple(tensor.shape), note))

    def leave_out(self, source: str, value: Any, why: str) -> None:
        """Say that what the file has under a name is not used."""
        self.rows.append(ConvertedTensor(source, "", tuple(getattr(value, "shape", ())), why))

    def note_once(self, note: str) -> None:
        """Add a note, unless it is there."""
        if note not in self.notes:
            self.notes.append(note)

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
