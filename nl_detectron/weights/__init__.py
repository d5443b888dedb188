"""
Weights of other implementations for our models, and our non-local blocks for theirs.

:func:`convert` takes a state dict and returns the converted one, the config under which it
computes the same, and a row for every tensor; ``tools/convert_weights.py`` does so with files.
"""

from nl_detectron.submodules import submodules
from nl_detectron.weights.conversion import Conversion, ConversionError, ConvertedTensor, Options
from nl_detectron.weights.convert import SOURCES, TARGETS, convert, recognise

__all__ = [
    "SOURCES",
    "TARGETS",
    "Conversion",
    "ConversionError",
    "ConvertedTensor",
    "Options",
    "convert",
    "recognise",
]

__getattr__ = submodules(__name__)
