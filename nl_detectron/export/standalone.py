"""
Run an exported detector where neither Detectron2 nor nl_detectron can be imported. It is a script
of its own, and an example:

    python standalone.py FORMAT MODEL IMAGES.npz OUTPUTS.npz

For each image (C, H, W) of IMAGES, called NAME, there is NAME/OUTPUT for each output in OUTPUTS.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Detector = Callable[[np.ndarray], "dict[str, np.ndarray]"]


def load_torchscript(file: str) -> Detector:
    """The detector of a traced file: from an image (C, H, W), float32, to the outputs by name."""
    import torch
    import torchvision  # noqa: F401 (for its operators nms and roi_align)

    model = torch.jit.load(file)

    def detect(image: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {name: x.numpy() for name, x in model(torch.from_numpy(image)).items()}

    return detect


def load_onnx(file: str) -> Detector:
    """The detector of an ONNX file, as from :func:`load_torchscript`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(names, {"image": image})))


if __name__ == "__main__":
    for package in ("detectron2", "nl_detectron"):
        sys.modules[package] = None  # type: ignore[assignment]  # importing it is an error
    format, model, images, outputs = sys.argv[1:]
    detect = load_onnx(model) if format == "onnx" else load_torchscript(model)
    found: dict[str, Any] = {}
    for image, pixels in np.load(images).items():
        found.update({f"{image}/{name}": x for name, x in detect(pixels).items()})
    np.savez(outputs, **found)
