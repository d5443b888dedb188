"""
Exporting a detector as a function of one image. It returns what the detector's heads do, before
Detectron2 scales boxes and pastes masks into the original image:

====================== ================ ===========================================================
name                   shape            per object found
====================== ================ ===========================================================
pred_boxes             (n, 4)           x0, y0, x1, y1, in pixels of the image
scores                 (n,)             in descending order
pred_classes           (n,)             int64
pred_masks             (n, 1, M, M)     probability of the mask, on a grid over the box
pred_keypoints         (n, K, 3)        x, y, in pixels of the image, and score
pred_keypoint_heatmaps (n, K, S, S)     logits, on a grid over the box
====================== ================ ===========================================================
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path

import torch
from detectron2.evaluation import inference_context
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional

from nl_detectron.export.verification import ExportError, verify
from nl_detectron.validation import check_choice

FORMATS = ("traced", "onnx")
"""TorchScript by tracing, ONNX."""

_SECOND_SIZE = 0.75  # the file is verified on the image and on one this much smaller, too


def export_detector(
    model: GeneralizedRCNN, image: Tensor, file: Path, format: str = "traced"
) -> None:
    """
    Write a detector to a file that takes images of any size. It is verified first, in a process
    that can import neither Detectron2 nor nl_detectron: there it finds the same as the model, in
    ``image``, in a smaller one, and in one without anything in it. If it does not, there is no
    file, or still the one that was there.

    Args:
        model: Detectron2's ``GeneralizedRCNN`` (Faster, Mask, Keypoint, Cascade R-CNN), on the CPU.
        image: (C, H, W), float32, as the model takes it; the model finds something in it.
        file: in a folder that exists.
        format: one of :data:`FORMATS`.

    Raises:
        ValueError: the format, the model or the image is not one of these, or the model finds
            nothing in the image.
        ModuleNotFoundError: onnx or onnxruntime is needed and not installed.
        ExportError: PyTorch can't export the model, or what it wrote does not find the same.
    """
    check_choice("format", format, FORMATS)
    _check_model(model)
    if format == "onnx":
        _check_onnx(model)
    with inference_context(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants in the trace: it is verified at other sizes
        if not len(_detect(model, image)["scores"]):
            raise ValueError("the model finds nothing in the image, so it could verify nothing")
        smaller = functional.interpolate(image[None], scale_factor=_SECOND_SIZE)[0]
        images = [image, smaller, torch.zeros_like(image)]
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as folder:
            unverified = Path(folder) / file.name
            _write(model, image, unverified, format)
            verify(unverified, format, [(x, _detect(model, x)) for x in images])
            os.replace(unverified, file)


def _check_model(model: GeneralizedRCNN) -> None:
    if type(model) is not GeneralizedRCNN:
        raise ValueError(
            f"the model is a {type(model).__name__}, but only Detectron2's GeneralizedRCNN is "
            "exported"
        )
    if model.device.type != "cpu":
        raise ValueError(f"the model is on {model.device}, but is exported on the CPU")


def _check_onnx(model: GeneralizedRCNN) -> None:
    if getattr(model.roi_heads, "keypoint_on", False):
        raise ValueError(
            "the model predicts keypoints, for which Detectron2 has no form in ONNX: "
            "choose another format (traced), for a file such as model.ts"
        )
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"{package} is needed to export to ONNX: pip install onnx onnxruntime"
            )


def _write(model: GeneralizedRCNN, image: Tensor, file: Path, format: str) -> None:
    try:
        traceable = _Traceable(model, image).eval()
        (_export_onnx if format == "onnx" else _export_traced)(traceable, image, file)
    except Exception as error:  # PyTorch's exporters raise any
        reason = f"{type(error).__name__}: {error}".split("\n\n")[0].replace("\n", " ")
        raise ExportError(f"PyTorch can't export the model as {format}: {reason}") from error


def _detect(model: GeneralizedRCNN, image: Tensor) -> dict[str, Tensor]:
    instances = model.inference([{"image": image}], do_postprocess=False)[0]
    fields = instances.get_fields().items()
    return {name: x.tensor if isinstance(x, Boxes) else x for name, x in fields}


class _Traceable(nn.Module):
    """Detectron2's TracingAdapter of ``_detect``, with names for what that returns as a tuple."""

    def __init__(self, model: GeneralizedRCNN, image: Tensor) -> None:
        super().__init__()
        self.adapter = TracingAdapter(model, image, _detect)
        self.adapter(image)
        self.names = self.adapter.outputs_schema.keys

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.adapter(image)))


def _export_traced(traceable: _Traceable, image: Tensor, file: Path) -> None:
    traced = torch.jit.trace(traceable, image, strict=False, check_trace=False)
    torch.jit.save(traced, file)


def _export_onnx(traceable: _Traceable, image: Tensor, file: Path) -> None:
    # torch.export, which the newer exporter (dynamo) builds on, does not take Detectron2's models.
    torch.onnx.export(
        traceable.adapter,
        (image,),
        file,
        dynamo=False,
        input_names=["image"],
        output_names=traceable.names,
        dynamic_axes={
            "image": {1: "height", 2: "width"},
            **{name: {0: "objects"} for name in traceable.names},
        },
    )
