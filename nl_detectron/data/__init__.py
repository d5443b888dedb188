"""Datasets: users' own in COCO's format, and the stream of training batches."""

import nl_detectron.data.toy  # noqa: F401
from nl_detectron.data.coco_json import configure_for_dataset, register_coco_json
from nl_detectron.data.coco_records import CompletingCOCOEvaluator
from nl_detectron.data.stream import TrainLoader, build_train_loader
from nl_detectron.submodules import submodules

__all__ = [
    "CompletingCOCOEvaluator",
    "TrainLoader",
    "build_train_loader",
    "configure_for_dataset",
    "register_coco_json",
]

__getattr__ = submodules(__name__)
