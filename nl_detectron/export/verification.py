"""Does an exported detector find what the model finds, where there is no Detectron2?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nl_detectron.export import standalone

# Of pixels, scores, probabilities and logits: far less than anybody sees, and far more than what
# another order of summation makes.
_ABSOLUTE_TOLERANCE = 1e-3
_RELATIVE_TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """What was exported does not do what the model does."""


def verify(file: Path, format: str, examples: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> None:
    """
    Run an exported detector without Detectron2, on images (C, H, W), each with what the model finds
    in it, by name. ExportError: it does not run there, or does not find the same.
    """
    found = _run_standalone(file, format, [image for image, _ in examples])
    for index, (image, expected) in enumerate(examples):
        size = " x ".join(map(str, image.shape[1:]))
        for name, tensor in expected.items():
            where = f"{name} of an image of {size} pixels"
            _compare(where, found[f"{index}/{name}"], tensor.numpy())


def _run_standalone(file: Path, format: str, images: Sequence[Tensor]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "images.npz", Path(folder) / "outputs.npz"
        pixels: dict[str, Any] = {str(index): image.numpy() for index, image in enumerate(images)}
        np.savez(inputs, **pixels)
        command = [sys.executable, standalone.__file__, format, file, inputs, outputs]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1]
            raise ExportError(f"what was exported does not run: {reason}")
        return dict(np.load(outputs))


def _compare(where: str, found: np.ndarray, expected: np.ndarray) -> None:
    if found.shape != expected.shape:
        raise ExportError(f"{where}: shape {found.shape} instead of the model's {expected.shape}")
    if not np.allclose(found, expected, _RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE):
        difference = np.abs(found - expected).max()
        raise ExportError(f"{where}: differs by up to {difference:.2g} from the model's")
