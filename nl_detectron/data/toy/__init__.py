"""The built-in datasets, drawn on first use. Importing this module registers them."""

from nl_detectron.data.toy.long_range import (
    default_long_range_root,
    make_long_range,
    register_long_range,
)
from nl_detectron.data.toy.long_range_match import (
    default_long_range_match_root,
    make_long_range_match,
    register_long_range_match,
)
from nl_detectron.data.toy.shapes import default_root, make_shapes, register_shapes

__all__ = [
    "default_long_range_match_root",
    "default_long_range_root",
    "default_root",
    "make_long_range",
    "make_long_range_match",
    "make_shapes",
    "register_long_range",
    "register_long_range_match",
    "register_shapes",
]

register_shapes(default_root())
register_long_range(default_long_range_root())
register_long_range_match(default_long_range_match_root())
