"""Predicting the objects of an image. Images are BGR, as OpenCV reads them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import DefaultPredictor

from nl_detectron.config import build_config
from nl_detectron.data import register_built_in
from nl_detectron.data.coco_json import category_metadata
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.drawing import draw_predictions
from nl_detectron.engine.run_config import find_checkpoint
from nl_detectron.engine.setup import (
    check_weights_exist,
    num_classes_of,
    own_data,
    use_cpu_without_cuda,
)
from nl_detectron.files import missing


class Predictor(DefaultPredictor):
    """
    Detectron2's ``DefaultPredictor`` (which see) of a trained model: weights that leave anything
    but non-local blocks untrained are refused, and files of weights run nothing.

    Attributes:
        metadata: names and colours of the classes and keypoints of the config's first test
            dataset; empty if that is not registered, or has not as many of them as the model.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Build the model and load ``MODEL.WEIGHTS``, a file or URL. The CPU stands in for CUDA where
        there is none.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the weights do not fit the model (``NonLocalCheckpointer``, strict).
        """
        unloaded = cfg.clone()
        unloaded.defrost()
        unloaded.MODEL.WEIGHTS = ""
        use_cpu_without_cuda(unloaded)
        super().__init__(unloaded)
        self.metadata = dataset_metadata(cfg)
        NonLocalCheckpointer(self.model, strict=True).load(cfg.MODEL.WEIGHTS)

    def draw(self, image: np.ndarray, scale: float = 1) -> np.ndarray:
        """Draw what is predicted for an image, (H, W, 3) to (scale H, scale W, 3), uint8."""
        instances = self(image)["instances"].to("cpu")
        return draw_predictions(image, instances, self.metadata, scale)


def files_of_run(run: str) -> tuple[str, str]:
    """Config and weights of a run, by its folder or a checkpoint in it. FileNotFoundError: it has
    no config."""
    weights = Path(run)
    if not weights.exists():
        raise FileNotFoundError(f"the run or checkpoint is {run}, a file that does not exist")
    if weights.is_dir():
        final = weights / "model_final.pth"
        weights = final if final.is_file() else Path(find_checkpoint(run).path or final)
    config_file = weights.with_name("config.yaml")
    if problem := missing(config_file):
        raise FileNotFoundError(f"{config_file} {problem}: name the config with --config-file")
    return str(config_file), str(weights)


def model_files(args: argparse.Namespace) -> tuple[str, str | None]:
    """:func:`files_of_run` of a command line's RUN, less what its options name otherwise."""
    if args.config_file:
        return args.config_file, args.weights
    if not args.run:
        raise ValueError("a RUN is needed, such as output, or --config-file and --weights")
    config_file, weights = files_of_run(args.run)
    return config_file, args.weights or weights


def trained_config(
    config_file: str, weights: str | None = None, overrides: Sequence[str] = ()
) -> CfgNode:
    """
    The config for a :class:`Predictor`.

    Args:
        config_file: a YAML file; that which training wrote beside the weights fits them best.
        weights: file or URL for ``MODEL.WEIGHTS``; by default the config's.
        overrides: config keys and their values, in turns.

    Raises:
        FileNotFoundError: the config, or the file of weights, does not exist.
        ValueError: there are no weights, an override has no value, or the file is no config.
        KeyError: an unknown config key; the message names the nearest one.
    """
    cfg = build_config(config_file, overrides)
    cfg.MODEL.WEIGHTS = weights = weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError(f"no weights are given, nor has {config_file} any in MODEL.WEIGHTS")
    check_weights_exist("--weights (or MODEL.WEIGHTS)", weights)
    register_built_in(cfg.DATASETS.TEST)
    return cfg


def image_mapper(cfg: CfgNode) -> DatasetMapper:
    """What makes a model's input of the record of an image, as evaluation does. Unlike
    ``DatasetMapper(cfg)``, it asks for no dataset of the config."""
    return DatasetMapper(
        is_train=False,
        augmentations=build_augmentation(cfg, is_train=False),
        image_format=cfg.INPUT.FORMAT,
    )


def dataset_metadata(cfg: CfgNode) -> Metadata:
    """What is registered of a config's first test dataset, or kept in it of own data, if that has
    as many classes, and keypoints if any, as its model, as far as that is known; else nothing."""
    model, known, categories = cfg.MODEL, num_classes_of(cfg), own_data(cfg).CATEGORIES
    name = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else ""
    if name in ("train", "val") and categories:
        metadata = Metadata().set(**category_metadata(categories))
    else:
        metadata = MetadataCatalog.get(name) if name else Metadata()
    num_keypoints = len(metadata.get("keypoint_names", []))
    fits = (known is None or len(metadata.get("thing_classes", [])) == known[1]) and (
        not model.KEYPOINT_ON or num_keypoints in (0, model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)
    )
    return metadata if fits else Metadata()
