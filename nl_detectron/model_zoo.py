"""
The configs of this package and the models they describe, by name, as Detectron2's model_zoo; and
detectors that others have trained.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from torch import nn

from nl_detectron.config import build_config
from nl_detectron.data import register_built_in
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.setup import check_weights_exist, device_here
from nl_detectron.validation import check_choice, did_you_mean
from nl_detectron.weights import convert
from nl_detectron.weights.checkpoint_io import load_checkpoint
from nl_detectron.weights.mmdetection import config_of

__all__ = [
    "get_config",
    "get_config_file",
    "get_model",
    "get_trained",
    "list_configs",
    "list_trained",
]


def list_configs() -> list[str]:
    """
    The names of all configs that train a model, sorted, such as
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.yaml". Those ending in ``.py`` are
    Detectron2's LazyConfigs.
    """
    folder = _folder()
    files = [path for suffix in ("yaml", "py") for path in folder.glob(f"**/*.{suffix}")]
    names = [path.relative_to(folder).as_posix() for path in files]
    return sorted(name for name in names if not name.startswith(("Base-", "common/")))


def get_config_file(name: str) -> str:
    """
    The path of a config's file: one of :func:`list_configs`, of whose name ``.yaml`` may be left
    out.

    Raises:
        ValueError: there is no such config; the message names the nearest one.
    """
    names = list_configs()
    full_name = name if name.endswith((".yaml", ".py")) else f"{name}.yaml"
    if full_name not in names:
        near = [other for other in names if other.endswith(f"/{full_name}")] or names
        hint = did_you_mean(full_name, near)
        raise ValueError(f"There is no config {name!r} among model_zoo.list_configs(){hint}")
    return str(_folder() / full_name)


def get_config(name: str) -> Any:
    """
    A config by its name: a ``CfgNode``, or a ``DictConfig`` if the name ends in ``.py``.

    Raises:
        ValueError: there is no such config; the message names the nearest one.
    """
    file = get_config_file(name)
    if file.endswith(".py"):
        return LazyConfig.load(file)
    cfg = build_config(file)
    register_built_in((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    return cfg


def get_model(name: str, weights: str | None = None, device: str | None = None) -> nn.Module:
    """
    The model that a config describes, in training mode.

    Args:
        name: as for :func:`get_config_file`.
        weights: a checkpoint's file or URL; "config" for what the config starts training from, for
            most of them an ImageNet classifier; None for random weights.
        device: such as "cpu"; by default the config's, or the CPU where there is no CUDA.

    Raises:
        ValueError: there is no such config; the message names the nearest one.
        FileNotFoundError: there are no such weights, or they cannot be downloaded.
        CheckpointError: see :meth:`NonLocalCheckpointer.load`.
    """
    cfg = get_config(name)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device or device_here("MODEL.DEVICE", cfg.MODEL.DEVICE)
        model, own_weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model, own_weights = instantiate(cfg.model), cfg.train.init_checkpoint
        model.to(device or device_here("train.device", cfg.train.device))
    path = own_weights if weights == "config" else weights
    if path:
        check_weights_exist("weights", path)
        NonLocalCheckpointer(model).load(path)
    return model


def list_trained() -> list[dict[str, Any]]:
    """
    The detectors with these blocks, and without, that others have trained on COCO.

    Returns:
        Of each the "file" that they offer, "model", "schedule", the published "box_ap" and
        "mask_ap" if it has masks, "block" if it has any, and whose "page" it is on; see
        docs/MODEL_ZOO.md.
    """
    text = Path(__file__).with_name("trained.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def get_trained(name: str, file: str | Path, device: str | None = None) -> nn.Module:
    """
    A detector that others have trained, converted from the file that they offer.

    Args:
        name: the "file" of one of :func:`list_trained`.
        file: where it was downloaded to.
        device: such as "cpu"; by default CUDA, or the CPU where there is none.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: there is no such detector, or the file is not the one of this name.
        CheckpointError, ConversionError: the file cannot be read or converted.
    """
    check_choice("name", name, [row["file"] for row in list_trained()])
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    # DNL-Object-Detection's files have no names that tell it.
    expected = Path(name).stem[-8:] if name.endswith(".pth") else ""
    if not found.startswith(expected):
        raise ValueError(
            f"{file} is not {name}, or is not whole: its SHA-256 begins with {found[:8]}, "
            f"not with {expected}"
        )
    conversion = convert(load_checkpoint(file), "mmdetection")
    cfg = config_of(conversion.settings)
    cfg.MODEL.DEVICE = device or device_here("MODEL.DEVICE", cfg.MODEL.DEVICE)
    model = build_model(cfg)
    model.load_state_dict(conversion.state_dict)
    return model


def _folder() -> Path:
    """The configs are installed inside the package, and lie beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
