"""What a run can go on from."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nl_detectron.weights.checkpoint_io import CheckpointError, load_checkpoint

_MOST_ITERATIONS = 2**40


@dataclass(frozen=True)
class FoundCheckpoint:
    """
    What a run can go on from.

    Attributes:
        path: the file; empty if there is none.
        trainer: the state of its trainer; empty if it has weights alone.
        note: what is amiss, in one line; else empty.
    """

    path: str = ""
    trainer: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def find_checkpoint(folder: str | Path) -> FoundCheckpoint:
    """
    Find what ``last_checkpoint`` names in a folder, or if that is missing or damaged, the sound
    checkpoint of the highest iteration.
    """
    tag = Path(folder, "last_checkpoint")
    try:
        if not (name := tag.read_text(encoding="utf-8").strip()):
            raise ValueError(f"{tag} is empty")
        return FoundCheckpoint(str(tag.with_name(name)), _trainer_state(tag.with_name(name)))
    except (OSError, ValueError) as error:  # a CheckpointError is one, too
        problem = f"{tag} is missing" if not tag.exists() else str(error)
    sound = []
    for path in Path(folder).glob("*.pth"):
        with contextlib.suppress(OSError, CheckpointError):
            if state := _trainer_state(path):
                sound.append((state["iteration"], str(path), state))
    if not sound:
        where = f"There is no checkpoint in {folder} to go on from"
        return FoundCheckpoint(note=f"{where} ({problem}): training starts afresh")
    _, newest, state = max(sound, key=lambda found: found[:2])
    note = f"{problem}: going on from {newest}, the newest sound checkpoint"
    return FoundCheckpoint(newest, state, note)


def _trainer_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint's trainer; empty if it has weights alone."""
    state = load_checkpoint(path).get("trainer", {})
    iteration = state.get("iteration", 0) if isinstance(state, dict) else None
    if type(iteration) is not int or not 0 <= iteration < _MOST_ITERATIONS:
        raise CheckpointError(
            f"{path} has no sound state of a trainer: its iteration is {iteration!r:.50}, but "
            f"must be an integer from 0 to {_MOST_ITERATIONS - 1}"
        )
    return state if "iteration" in state else {}
