"""The built-in datasets, drawn on first use. Importing this module registers them."""

from nl_detectron.data.toy.long_range import make_long_range, register_long_range
from nl_detectron.data.toy.long_range_match import make_long_range_match, register_long_range_match
from nl_detectron.data.toy.shapes import make_shapes, register_shapes

__all__ = [
    "make_long_range",
    "make_long_range_match",
    "make_shapes",
    "register_long_range",
    "register_long_range_match",
    "register_shapes",
]

register_shapes()
register_long_range()
register_long_range_match()
