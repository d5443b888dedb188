"""Whose value a resumed run takes where its config and that of its checkpoint differ."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from detectron2.utils import comm

from nl_detectron.engine.found_checkpoint import find_checkpoint

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    *("OUTPUT_DIR", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK"),
    *("MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.NONLOCAL.USE_ACT_CHECKPOINT"),
    *("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.NUM_DECAYS", "SOLVER.CHECKPOINT_*"),
    *("DATALOADER.NUM_WORKERS", "TEST.*", "*TEST"),
    # The same for LazyConfigs.
    *("train.output_dir", "train.device", "train.init_checkpoint", "train.max_iter"),
    *("train.*_period", "train.checkpointer.*", "lr_multiplier.*", "*.num_workers"),
    *("dataloader.test.*", "dataloader.evaluator.*"),
)
"""The keys whose new value takes effect in a resumed run; of all others the old one goes on."""


def values_to_keep(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The values that make a run what it is, by their keys; what is no plain value is left out."""
    return {
        key: value
        for key, value in _values(cfg)
        if not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
    }


def keep_values_of_checkpoint(cfg: Any, output_dir: str) -> None:
    """
    Set, in place, what a resumed run has to go on with, and say so in one line.

    Args:
        cfg: Detectron2's config, of either kind, of which nothing is built yet.
        output_dir: where the run has its checkpoints.

    Raises:
        ValueError: the config is scaled by the number of processes, and that is another one.
    """
    mine = _state_in(output_dir) if comm.is_main_process() else {}
    state = comm.all_gather(mine)[0]
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


def _state_in(folder: str) -> dict[str, Any]:
    """What :class:`ExactResume` has saved; empty for the checkpoints of others."""
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
