"""Detectors in files that run without Detectron2 and nl_detectron."""

from nl_detectron.export.detector import FORMATS, export_detector
from nl_detectron.export.verification import ExportError
from nl_detectron.submodules import submodules

__all__ = ["FORMATS", "ExportError", "export_detector"]

__getattr__ = submodules(__name__)
