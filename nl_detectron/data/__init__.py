"""Datasets: the built-in shapes, and users' own in COCO's format."""

from nl_detectron.data.coco_json import configure_for_dataset, register_coco_json
from nl_detectron.data.shapes import default_root, make_shapes, register_shapes

__all__ = ["configure_for_dataset", "make_shapes", "register_coco_json", "register_shapes"]

register_shapes(default_root())
