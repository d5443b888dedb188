"""What is checked and set in a config before it runs here: weights, datasets, device, norms."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from nl_detectron.data import configure_for_dataset, register_coco_json
from nl_detectron.validation import check_choice

logger = logging.getLogger(__name__)


def is_missing_file(weights: str) -> bool:
    """
    Args:
        weights: a file, or a URL.

    Returns:
        Whether it names a file, and there is none.
    """
    return "://" not in weights and not Path(weights).is_file()


def check_weights_exist(key: str, weights: str) -> None:
    """
    Args:
        key: the config's key for weights, for the message.
        weights: its value: a file; or a URL, which is not looked up; or empty, for none.

    Raises:
        FileNotFoundError: it is a file that does not exist.
    """
    if weights and is_missing_file(weights):
        raise FileNotFoundError(f"{key} is {weights}, a file that does not exist")


def check_datasets_registered(cfg: CfgNode) -> None:
    """
    Args:
        cfg: the config.

    Raises:
        ValueError: one of ``DATASETS.TRAIN`` or ``DATASETS.TEST`` is not registered.
    """
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            check_choice(f"DATASETS.{key}", name, DatasetCatalog.list())


def use_own_data(
    cfg: CfgNode,
    train_json: str,
    train_images: str,
    val_json: str,
    val_images: str,
    *,
    keep_records: bool = True,
) -> None:
    """
    Register a user's data as "train" and "val", and fit a config to them, in place: see
    :func:`register_coco_json` and :func:`configure_for_dataset`.

    Args:
        cfg: the config.
        train_json: annotations to train on, in COCO's format.
        train_images: the folder of the images in it.
        val_json: annotations to evaluate on.
        val_images: the folder of the images in it.
        keep_records: what is trained on follows, and is kept for it.

    Raises:
        FileNotFoundError: one of the files, folders or images does not exist.
        ValueError: a file is not in COCO's format, or they do not fit each other or the model.
    """
    register_coco_json("train", train_json, train_images, keep_records=keep_records)
    # A picture that cannot be read must not end the run after hours of training.
    register_coco_json("val", val_json, val_images, pictures="header")
    try:
        configure_for_dataset(cfg, "train", "val")
    except ValueError as error:
        raise ValueError(f"{train_json}, {val_json}: {error}") from error


def use_cpu_without_cuda(cfg: CfgNode) -> None:
    """
    Where there is no CUDA device, set ``MODEL.DEVICE`` to "cpu", in place.

    Args:
        cfg: the config.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.info("There is no CUDA device: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"


def use_sync_bn_of_cpu(cfg: CfgNode) -> None:
    """
    With many processes on CPUs, make ``NORM: SyncBN`` "naiveSyncBN_N", in place, anywhere in the
    config: PyTorch's own needs CUDA. Detectron2's does the same (without RoIs, too), more slowly;
    the names of its weights are the same. Its running variance is the biased one.

    Args:
        cfg: the config.
    """
    if comm.get_world_size() == 1 or not cfg.MODEL.DEVICE.startswith("cpu"):
        return
    if _replace_norms(cfg):
        logger.info("SyncBN needs CUDA: on CPUs it is naiveSyncBN_N.")


def _replace_norms(node: CfgNode) -> bool:
    replaced = False
    for key, value in node.items():
        if isinstance(value, CfgNode):
            replaced |= _replace_norms(value)
        elif key == "NORM" and value in ("SyncBN", "nnSyncBN"):
            node[key] = "naiveSyncBN_N"
            replaced = True
    return replaced
