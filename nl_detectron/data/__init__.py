"""Datasets: the built-in ones, and users' own in COCO's format."""

from nl_detectron.data.coco_json import configure_for_dataset, register_coco_json
from nl_detectron.data.coco_records import CompletingCOCOEvaluator
from nl_detectron.data.long_range import (
    default_long_range_root,
    make_long_range,
    register_long_range,
)
from nl_detectron.data.long_range_match import (
    default_long_range_match_root,
    make_long_range_match,
    register_long_range_match,
)
from nl_detectron.data.shapes import default_root, make_shapes, register_shapes
from nl_detectron.data.stream import TrainLoader, build_train_loader

__all__ = [
    "CompletingCOCOEvaluator",
    "TrainLoader",
    "build_train_loader",
    "configure_for_dataset",
    "make_long_range",
    "make_long_range_match",
    "make_shapes",
    "register_coco_json",
    "register_long_range",
    "register_long_range_match",
    "register_shapes",
]

register_shapes(default_root())
register_long_range(default_long_range_root())
register_long_range_match(default_long_range_match_root())
