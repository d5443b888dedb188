"""Predicting the objects of an image, and drawing them. Images are BGR, as OpenCV reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image, ImageDraw, ImageFont

from nl_detectron.config import build_config
from nl_detectron.data.coco_format import Record
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.setup import is_missing_file, use_cpu_without_cuda

GAP = 8  # between pictures, in pixels


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
        Args:
            cfg: the config; ``MODEL.WEIGHTS`` is the file or URL of the trained weights. The CPU
                stands in for CUDA where there is none.

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
        """Predict, and draw it: see :func:`draw_predictions`."""
        instances = self(image)["instances"].to("cpu")
        return draw_predictions(image, instances, self.metadata, scale)


def trained_config(
    config_file: str, weights: str | None = None, overrides: Sequence[str] = ()
) -> CfgNode:
    """
    Args:
        config_file: a YAML file; that which training wrote beside the weights fits them best.
        weights: file or URL for ``MODEL.WEIGHTS``; by default the config's.
        overrides: config keys and their values, in turns.

    Returns:
        The config for :class:`Predictor`.

    Raises:
        FileNotFoundError: the config, or the file of weights, does not exist.
        ValueError: there are no weights, an override has no value, or the file is no config.
        KeyError: an unknown config key; the message names the nearest one.
    """
    cfg = build_config(config_file, overrides)
    cfg.MODEL.WEIGHTS = weights = weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError(f"no weights are given, nor has {config_file} any in MODEL.WEIGHTS")
    if is_missing_file(weights):
        raise FileNotFoundError(f"the weights {weights} do not exist")
    return cfg


def dataset_metadata(cfg: CfgNode) -> Metadata:
    """
    What is registered of the config's first test dataset, if that has as many classes, and
    keypoints if any, as the config's model; else nothing.
    """
    model = cfg.MODEL
    head = model.RETINANET if model.META_ARCHITECTURE == "RetinaNet" else model.ROI_HEADS
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata()
    num_keypoints = len(metadata.get("keypoint_names", []))
    fits = len(metadata.get("thing_classes", [])) == head.NUM_CLASSES and (
        not model.KEYPOINT_ON or num_keypoints in (0, model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)
    )
    return metadata if fits else Metadata()


def draw_predictions(
    image: np.ndarray, instances: Instances, metadata: Metadata, scale: float = 1
) -> np.ndarray:
    """
    Draw boxes with classes and scores, masks and keypoints, in the colours of the classes. Holes in
    masks stay open.

    Args:
        image: (H, W, 3), uint8.
        instances: what a model predicts for the image, on the CPU.
        metadata: names and colours, where known (:func:`dataset_metadata`).
        scale: size of the picture over that of the image.

    Returns:
        (scale H, scale W, 3), uint8.
    """
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale)
    classes = instances.pred_classes.tolist()
    names = metadata.get("thing_classes")
    palette = metadata.get("thing_colors") or colormap(rgb=True)
    colors = [tuple(np.divide(palette[i % len(palette)], 255)) for i in classes]
    if instances.has("pred_masks"):
        # Not by overlay_instances, which would fill the holes.
        for mask, color in zip(instances.pred_masks.numpy(), colors):
            visualizer.draw_binary_mask(mask.astype(np.uint8), color)
    canvas = visualizer.overlay_instances(
        boxes=instances.pred_boxes,
        labels=[
            f"{names[i] if names else i} {score:.0%}"
            for i, score in zip(classes, instances.scores.tolist())
        ],
        keypoints=instances.pred_keypoints if instances.has("pred_keypoints") else None,
        assigned_colors=colors,
    )
    return canvas.get_image()[:, :, ::-1]


def draw_ground_truth(
    image: np.ndarray, record: Record, metadata: Metadata, scale: float = 1
) -> np.ndarray:
    """
    Draw the annotations of a record of a registered dataset; see :func:`draw_predictions`.
    """
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale, ColorMode.SEGMENTATION)
    return visualizer.draw_dataset_dict(record).get_image()[:, :, ::-1]


def side_by_side(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """
    Args:
        pictures: (H_i, W_i, 3), uint8.
        captions: one for each.

    Returns:
        (H, W, 3), uint8: the pictures from left to right on white, each under its caption.
    """
    columns = [np.vstack([_strip(text, p.shape[1]), p]) for p, text in zip(pictures, captions)]
    height = max(len(column) for column in columns)
    padded = [
        np.pad(c, ((0, height - len(c)), (GAP * (i > 0), 0), (0, 0)), constant_values=255)
        for i, c in enumerate(columns)
    ]
    return np.hstack(padded)


def _strip(caption: str, width: int) -> np.ndarray:
    """A caption, (height, width, 3), in letters that suit the width and let it fit."""
    size = min(max(width / 24, 14), 32)
    height = round(1.8 * size)
    length = ImageFont.load_default(size).getlength(caption)
    font = ImageFont.load_default(size * min(1, 0.95 * width / max(length, 1)))
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((width / 2, height / 2), caption, "black", font, anchor="mm")
    return np.asarray(strip)
