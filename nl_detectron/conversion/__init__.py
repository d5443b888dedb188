"""
Weights from other implementations into ours, and non-local blocks of ours into others'.

:func:`convert` takes a state dict and hands back the converted one, the config under which it
computes the same, and a row for every tensor; ``tools/convert_weights.py`` does so with files.
"""

from nl_detectron.conversion.convert import SOURCES, TARGETS, convert, recognise
from nl_detectron.conversion.report import Conversion, ConversionError, Row

__all__ = ["SOURCES", "TARGETS", "Conversion", "ConversionError", "Row", "convert", "recognise"]
