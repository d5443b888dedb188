"""What a run can go on from, and whose value it takes where that has another config."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.utils import comm

from nl_detectron.weights.checkpoint_io import CheckpointError, load_checkpoint

logger = logging.getLogger(__name__)

_MOST_ITERATIONS = 2**40

# The keys whose new value takes effect in a resumed run; of all others the old one goes on.
MAY_CHANGE = (
    *("OUTPUT_DIR", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK"),
    *("MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.NONLOCAL.USE_ACT_CHECKPOINT"),
    *("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.NUM_DECAYS", "SOLVER.CHECKPOINT_*"),
    *("DATASETS.OWN.*", "DATALOADER.NUM_WORKERS", "TEST.*", "*TEST"),
    # The same for LazyConfigs.
    *("train.output_dir", "train.device", "train.init_checkpoint", "train.max_iter"),
    *("train.*_period", "train.checkpointer.*", "lr_multiplier.*", "*.num_workers"),
    *("dataloader.test.*", "dataloader.evaluator.*"),
)


class FoundCheckpoint(NamedTuple):
    """What a run can go on from."""

    path: str  # empty if there is none
    trainer: dict[str, Any]  # its state; empty if the file has weights alone
    note: str  # what is amiss, in one line; else empty


def find_checkpoint(folder: str | Path) -> FoundCheckpoint:
    """Find what ``last_checkpoint`` names in a folder, or if that is missing or damaged, the sound
    checkpoint of the highest iteration."""
    tag = Path(folder, "last_checkpoint")
    try:
        if not (name := tag.read_text(encoding="utf-8").strip()):
            raise ValueError(f"{tag} is empty")
        return FoundCheckpoint(str(tag.with_name(name)), _trainer_state(tag.with_name(name)), "")
    except (OSError, ValueError) as error:  # a CheckpointError is one, too
        problem = f"{tag} is missing" if not tag.exists() else str(error)
    sound = []
    for path in Path(folder).glob("*.pth"):
        with contextlib.suppress(OSError, CheckpointError):
            if state := _trainer_state(path):
                sound.append((state["iteration"], str(path), state))
    if not sound:
        where = f"There is no checkpoint in {folder} to go on from"
        return FoundCheckpoint("", {}, f"{where} ({problem}): training starts afresh")
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


def values_to_keep(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The values that make a run what it is, by their keys; what is no plain value is left out."""
    return {
        key: value
        for key, value in _values(cfg)
        if not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
    }


def keep_values_of_checkpoint(cfg: Any, output_dir: str) -> None:
    """Set, in place, what a resumed run has to go on with, and say so in one line. Nothing is built
    yet of the config, of either kind of Detectron2's. ValueError: it is scaled by the number of
    processes, and that is another one."""
    state = saved_run(output_dir)
    kept, changed = state.get("config", {}), []
    for key, value in values_to_keep(cfg).items():
        if key in kept and kept[key] != value:
            changed.append(f"{key} {kept[key]!r} (not {value!r})")
            _set(cfg, key, kept[key])
    if changed:
        logger.warning(
            f"--resume goes on with the checkpoint's {', '.join(changed)}; a new run that starts "
            "with its weights takes other values"
        )
    before, now = state.get("processes"), comm.get_world_size()
    if before in (None, now):
        return
    if kept.get("SOLVER.REFERENCE_WORLD_SIZE"):
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE scales the run to its {before} processes, but now there "
            f"are {now}: it can only go on with {before}"
        )
    logger.warning(
        f"--resume goes on with {now} processes, not {before}: with the same images, but not bit "
        "for bit"
    )


def saved_run(folder: str) -> dict[str, Any]:
    """What :class:`ExactResume` has saved, such as the values to keep in "config", as the main
    process finds it; empty without a checkpoint, and for those of others."""
    return comm.all_gather(_state_in(folder) if comm.is_main_process() else {})[0]


def _state_in(folder: str) -> dict[str, Any]:
    state: Any = find_checkpoint(folder).trainer
    for key in ("hooks", "ExactResume"):
        state = state.get(key) if isinstance(state, dict) else None
    return state if isinstance(state, dict) and isinstance(state.get("config"), dict) else {}


def _values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All that a config holds of numbers, words, and lists of them, by dotted keys."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    for key, value in items:
        if (plain := _plain(value)) is not None:
            yield f"{prefix}{key}", plain
        elif isinstance(value, Mapping) or _is_list(value):
            yield from _values(value, f"{prefix}{key}.")


def _plain(value: Any) -> Any:
    """A value as it can be compared and saved; None if it is, or has, anything else."""
    if _is_list(value):
        parts = [_plain(part) for part in value]
        return None if None in parts else parts
    return value if isinstance(value, (bool, int, float, str)) else None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _set(cfg: Any, key: str, value: Any) -> None:
    *parents, last = (int(part) if part.isdecimal() else part for part in key.split("."))
    for parent in parents:
        cfg = cfg[parent]
    old = cfg[last]
    cfg[last] = tuple(value) if isinstance(old, tuple) else value
