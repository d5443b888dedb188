"""Datasets: users' own in COCO's format, the stream of training batches, and the built-in ones."""

from collections.abc import Iterable
from importlib import import_module

from detectron2.data import DatasetCatalog

from nl_detectron.data.coco_json import configure_for_dataset, register_coco_json
from nl_detectron.data.coco_records import CompletingCOCOEvaluator
from nl_detectron.data.fast_evaluation import FastCOCOEvaluator
from nl_detectron.data.stream import TrainLoader, build_train_loader
from nl_detectron.submodules import submodules

__all__ = [
    "CompletingCOCOEvaluator",
    "FastCOCOEvaluator",
    "TrainLoader",
    "build_train_loader",
    "configure_for_dataset",
    "register_built_in",
    "register_coco_json",
]


def register_built_in(names: Iterable[str]) -> None:
    """Register the built-in datasets of :mod:`nl_detectron.data.toy`, unless all ``names``, which
    are about to be used, are registered.

    Raises:
        ValueError: one of them is built in, and shapely, which draws it, is not installed.
    """
    unknown = [name for name in names if name not in DatasetCatalog]
    if not unknown:
        return
    try:
        import_module("nl_detectron.data.toy")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "shapely":
            raise
        if built_in := [name for name in unknown if name.startswith(("shapes_", "long_range"))]:
            raise ValueError(
                f"The dataset {built_in[0]} is drawn with shapely, which is not installed: "
                "pip install shapely"
            ) from error


_TOYS = ("long_range", "long_range_match", "shapes")
_OF_TOYS = [f"{verb}_{toy}" for verb in ("make", "register") for toy in _TOYS]
__getattr__ = submodules(__name__, dict.fromkeys(_OF_TOYS, "nl_detectron.data.toy"))
