"""The old place of what :mod:`nl_detectron.weights` converts with."""

from nl_detectron.weights import (
    SOURCES,
    TARGETS,
    Conversion,
    ConversionError,
    Options,
    Row,
    convert,
    recognise,
)

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
