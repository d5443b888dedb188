"""The old place, and names, of what :mod:`nl_detectron.weights` converts with."""

from nl_detectron.weights import (
    SOURCES,
    TARGETS,
    Conversion,
    ConversionError,
    Options,
    convert,
    recognise,
)
from nl_detectron.weights import ConvertedTensor as Row

__all__ = [
    "SOURCES",
    "TARGETS",
    "Conversion",
    "ConversionError",
    "Options",
    "Row",
    "convert",
    "recognise",
]
