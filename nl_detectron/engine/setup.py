"""What is checked and set in a config before it runs here: weights, datasets, device, norms."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from nl_detectron.config import walk
from nl_detectron.data import configure_for_dataset, register_built_in, register_coco_json
from nl_detectron.data.coco_json import category_metadata
from nl_detectron.files import missing
from nl_detectron.validation import check_choice, did_you_mean

logger = logging.getLogger(__name__)

_AUGMENTED = ("GeneralizedRCNN",)  # by Detectron2's test-time augmentation
_HEADS_OF = {  # MODEL.META_ARCHITECTURE to the node with its number of classes
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
}
_UNKNOWN_NAME = re.compile(r"No object named '(.*)' found in '(\w+)' registry")
_OWN_PATHS = ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")  # of DATASETS.OWN
_OF_CATEGORIES = ("id", "name", "keypoints", "skeleton")  # what is kept of COCO's
_SYNC_BN = ("SyncBN", "nnSyncBN")
_NOT_FOR_THE_SCREEN = ("default_setup", "build_model")
# What PyTorch warns of where Detectron2 turns annotations into tensors, which it only reads.
_OF_DETECTRON2 = ("The given NumPy array is not writ", "Creating a tensor from a list of numpy.nd")


def set_up_logging(output_dir: str) -> None:
    """Log to the screen and to ``log.txt``, what Detectron2 logs of environment, config and model
    to that alone, and what PyTorch tells the authors of Detectron2 nowhere."""
    # It warns where there is no CUDA, when Detectron2 looks at the environment.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(detectron2|fvcore)\.")
    for message in _OF_DETECTRON2:
        warnings.filterwarnings("ignore", message, UserWarning)
    rank = comm.get_rank()
    setup_logger(output_dir, name="nl_detectron", distributed_rank=rank)
    # As default_setup calls it, which then finds it done.
    for handler in setup_logger(output_dir, distributed_rank=rank).handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(lambda record: record.funcName not in _NOT_FOR_THE_SCREEN)


def check_weights_exist(key: str, weights: str) -> None:
    """Refuse weights that are not there, by a FileNotFoundError that names their ``key``; those at
    a URL are downloaded, if they are not kept already."""
    if "://" in weights:
        logger.info(f"{key}: {weights} is downloaded, if it was not before")
        # Its progress bar and its log would say a failure beside the error.
        logging.getLogger("iopath.common.download").setLevel(logging.CRITICAL)
        try:
            with redirect_stderr(io.StringIO()):
                PathManager.get_local_path(weights)
        except OSError as error:
            raise FileNotFoundError(
                f"{key} is {weights}, which cannot be downloaded ({error}): set {key} to a file "
                "that you have fetched in another way"
            ) from error
    elif weights and missing(weights):
        kind = "folder, not a file" if Path(weights).is_dir() else "file that does not exist"
        raise FileNotFoundError(f"{key} is {weights}, a {kind}")


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Check that the registered datasets of a config are there and fit its model."""
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            check_choice(f"DATASETS.{key}", name, DatasetCatalog.list())
            metadata = MetadataCatalog.get(name)
            if problem := missing_download(name):
                raise FileNotFoundError(f"DATASETS.{key} has {name}, but there is {problem}")
            classes, known = metadata.get("thing_classes"), num_classes_of(cfg)
            if classes is not None and known and known[1] != len(classes):
                key, number = known
                raise ValueError(f"{key} is {number}, but {name} has {len(classes)} classes")


def check_evaluation(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Check that ``TEST`` asks for what there is, and evaluations in training tell the metric."""
    model = cfg.MODEL
    if cfg.TEST.AUG.ENABLED:
        check_choice(
            "MODEL.META_ARCHITECTURE (with TEST.AUG.ENABLED)", model.META_ARCHITECTURE, _AUGMENTED
        )
        for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):  # which Detectron2 does not augment
            check_choice(f"MODEL.{key} (with TEST.AUG.ENABLED)", model[key], (False,))
    if cfg.TEST.FAST_EVAL and find_spec("faster_coco_eval") is None:
        raise ValueError(
            "TEST.FAST_EVAL is True, but faster-coco-eval is not installed: pip install "
            "faster-coco-eval, or set it to False"
        )
    metric = cfg.TEST.BEST_CHECKPOINT_METRIC
    if eval_only or not metric:
        return
    if not cfg.TEST.EVAL_PERIOD:
        raise ValueError(
            f"TEST.BEST_CHECKPOINT_METRIC is {metric!r}, but TEST.EVAL_PERIOD is 0: it must be "
            "above 0, so that there is more than the last checkpoint to choose from"
        )
    datasets = cfg.DATASETS.TEST
    heads = {"bbox": True, "segm": model.MASK_ON, "keypoints": model.KEYPOINT_ON}
    prefixes = [""] if len(datasets) == 1 else [f"{name}/" for name in datasets]
    tasks = [f"{prefix}{task}" for prefix in prefixes for task, is_on in heads.items() if is_on]
    classes = {c for name in datasets for c in MetadataCatalog.get(name).get("thing_classes", ())}
    if metric not in {f"{task}/AP-{name}" for task in tasks for name in classes}:
        aps = [f"{task}/AP{of}" for task in tasks for of in ("", "50", "75", "s", "m", "l")]
        legal = [ap for ap in aps if not ap.endswith("keypoints/APs")]
        check_choice("TEST.BEST_CHECKPOINT_METRIC", metric, legal)


def drop_late_steps(cfg: CfgNode) -> None:
    """Leave out of ``SOLVER.STEPS``, in place, what is not before ``SOLVER.MAX_ITER``."""
    steps, end = cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER
    cfg.SOLVER.STEPS = tuple(step for step in steps if step < end)
    if late := [step for step in steps if step >= end]:
        logger.info(
            f"SOLVER.STEPS has {late}, but the run ends at SOLVER.MAX_ITER, {end}: left out"
        )


def missing_download(name: str) -> str | None:
    """Which file or folder of a dataset is not in ``$DETECTRON2_DATASETS``, as "no FILE (...)";
    None for none. What is elsewhere is not looked at: built-in datasets are made on first use."""
    root = os.getenv("DETECTRON2_DATASETS")
    folder = Path(root or "datasets").expanduser()
    metadata = MetadataCatalog.get(name)
    for path in (metadata.get("json_file"), metadata.get("image_root")):
        if path and Path(path).is_relative_to(folder) and not Path(path).exists():
            return f"no {path} (DETECTRON2_DATASETS is {root or 'not set'})"
    return None


def num_classes_of(cfg: CfgNode) -> tuple[str, int] | None:
    """The key of the number of classes that a model detects, and its value; None if not known."""
    head = _HEADS_OF.get(cfg.MODEL.META_ARCHITECTURE)
    return (f"MODEL.{head}.NUM_CLASSES", cfg.MODEL[head].NUM_CLASSES) if head else None


@contextmanager
def config_keys_in_errors(cfg: CfgNode) -> Iterator[None]:
    """Within the ``with``, name the key of the value because of which building a model fails, in a
    ValueError in the place of Detectron2's KeyError and AssertionError."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"The model cannot be built: {error}") from error
    except KeyError as error:
        values, feature = dict(walk(cfg)), error.args[0] if error.args else None
        if found := _UNKNOWN_NAME.search(str(feature)):
            registry = getattr(modeling, f"{found[2]}_REGISTRY", ())
            for key in [key for key, value in values.items() if value == found[1]]:
                check_choice(key, found[1], sorted(name for name, _ in registry))
        lists = {
            key: value
            for key, value in values.items()
            if key.endswith("_FEATURES") and isinstance(value, (list, tuple))
        }
        keys = [key for key, names in lists.items() if feature in names]
        if not keys:
            raise
        others = [name for key, names in lists.items() if key not in keys for name in names]
        raise ValueError(
            f"{', '.join(keys)} has {feature!r}, which the model does not have"
            f"{did_you_mean(feature, others)}"
        ) from error


def use_own_data(
    cfg: CfgNode,
    train_json: str | None = None,
    train_images: str | None = None,
    val_json: str | None = None,
    val_images: str | None = None,
    *,
    eval_only: bool = False,
) -> None:
    """Let a config train and evaluate on a user's data, in place, and register them: what is None
    stays as ``DATASETS.OWN`` has it. ValueError: something is missing, or see
    :func:`register_datasets`."""
    cfg.DATASETS.OWN = own = own_data(cfg)
    for key, path in zip(_OWN_PATHS, (train_json, train_images, val_json, val_images)):
        own[key] = os.path.abspath(path) if path else own[key]
    if not all(own[key] for key in _OWN_PATHS[2 if eval_only else 0 :]):
        raise ValueError(
            "--train-json, --train-images, --val-json and --val-images are needed together, with "
            "--eval-only the last two"
        )
    cfg.DATASETS.TEST = ("val",)
    cfg.DATASETS.TRAIN = ("train",) if own.TRAIN_JSON else cfg.DATASETS.TRAIN
    register_datasets(cfg, eval_only=eval_only)


def own_data(cfg: CfgNode) -> CfgNode:
    """``DATASETS.OWN``; where a config has none, an empty one."""
    empty = {**dict.fromkeys(_OWN_PATHS, ""), "CATEGORIES": []}
    return cfg.DATASETS.get("OWN") or CfgNode(empty)


def register_datasets(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """
    Register what a config trains and evaluates on: built-in sets, and what ``DATASETS.OWN`` has
    for the names "train" and "val", to which the config is fitted, in place
    (:func:`configure_for_dataset`). Of own data the headers of all pictures that are used are
    read, so that none ends the run, or is read as something else, after hours of training.

    Raises:
        FileNotFoundError: own data are not where the config says; the message names the key.
        ValueError: they have another error, or other classes than the model was trained on.
    """
    own, (train, test) = own_data(cfg), (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    trained_on = own.CATEGORIES if eval_only else []
    names = {*test, *(() if trained_on else train)}
    register_built_in(names if not eval_only else test)
    used = [name for name in ("train", "val") if name in names and own[f"{name.upper()}_JSON"]]
    for name in used:
        looks = "present" if eval_only and name not in test else "header"
        is_trained = name in train and not eval_only
        _register_own(name, own, pictures=looks, keep_records=is_trained)
    if not used:
        return
    files = ", ".join(own[f"{name.upper()}_JSON"] for name in used)
    try:
        configure_for_dataset(cfg, used[0], used[-1], eval_only=eval_only)
    except ValueError as error:
        raise ValueError(f"{files}: {error}") from error
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    metadata = MetadataCatalog.get(used[0])
    if trained_on:
        classes = category_metadata(trained_on)["thing_classes"]
        if metadata.thing_classes != classes:
            raise ValueError(
                f"{files} has the classes {metadata.thing_classes} (in the order of their ids), "
                f"but the model was trained on {classes}"
            )
        return
    cfg.DATASETS.OWN = own
    own.CATEGORIES = [
        {key: category[key] for key in _OF_CATEGORIES if key in category}
        for category in metadata.categories
    ]


def _register_own(name: str, own: CfgNode, **options: Any) -> None:
    keys = (f"{name.upper()}_JSON", f"{name.upper()}_IMAGES")
    for key in keys:
        if not own[key] or not Path(own[key]).exists():
            raise FileNotFoundError(
                f"DATASETS.OWN.{key} is {own[key]!r}, which does not exist: name where it is now "
                f"by DATASETS.OWN.{key} PATH (or --{key.lower().replace('_', '-')} PATH)"
            )
    register_coco_json(name, *(own[key] for key in keys), **options)


def device_here(key: str, device: str) -> str:
    """The device that a config names under a key; where there is no CUDA, "cpu" in its place."""
    if not device.startswith("cuda") or torch.cuda.is_available():
        return device
    logger.info(f"There is no CUDA device: {key} is set to cpu.")
    return "cpu"


def use_cpu_without_cuda(cfg: CfgNode) -> None:
    """Where there is no CUDA device, set ``MODEL.DEVICE`` to "cpu", in place."""
    cfg.MODEL.DEVICE = device_here("MODEL.DEVICE", cfg.MODEL.DEVICE)


def use_sync_bn_of_cpu(cfg: CfgNode) -> None:
    """With many processes on CPUs, make ``NORM: SyncBN`` "naiveSyncBN_N", in place, anywhere in the
    config: PyTorch's own needs CUDA. Detectron2's does the same (without RoIs, too), more slowly;
    the names of its weights are the same. Its running variance is the biased one."""
    if comm.get_world_size() == 1 or not cfg.MODEL.DEVICE.startswith("cpu"):
        return
    norms = [key for key, value in walk(cfg) if key.endswith("NORM") and value in _SYNC_BN]
    for key in norms:
        cfg.merge_from_list([key, "naiveSyncBN_N"])
    if norms:
        logger.info("SyncBN needs CUDA: on CPUs it is naiveSyncBN_N.")
