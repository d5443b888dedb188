"""What Detectron2 writes to ``metrics.json`` during training and evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
"""COCO's tasks, as Detectron2 names them, to what people call their APs."""

_AP = re.compile(r"\w+/AP(50|75)?")


def metrics_file(run: Path) -> Path:
    """The ``metrics.json`` of a run's output folder, or that file itself; it need not exist."""
    return run / "metrics.json" if run.is_dir() else run


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """In the order of writing, each with "iteration"; a resumed run writes some again. ValueError:
    a line is not such a record."""
    file = metrics_file(run)
    records = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            record["iteration"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}, is not a JSON object with an iteration: {line[:60]!r}"
            ) from error
        records.append(record)
    return records


def last_aps(run: Path) -> dict[str, float]:
    """The last "bbox/AP", "bbox/AP50" and so on, in percent, as far as a run has them yet."""
    metrics: dict[str, float] = {}
    for record in read_metrics(run) if metrics_file(run).is_file() else []:
        metrics.update(record)
    return {name: value for name, value in metrics.items() if _AP.fullmatch(name)}
