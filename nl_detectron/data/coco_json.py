"""A user's own dataset in COCO's JSON format: check it, register it, fit a config to it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from iopath.common.file_io import get_cache_dir

from nl_detectron.data.coco_format import Record, read_coco

logger = logging.getLogger(__name__)

NUM_PERSON_KEYPOINTS = 17  # COCO's persons, the only ones with measured OKS sigmas
UNIFORM_OKS_SIGMA = 0.05  # for all others; COCO's run from 0.025 (eyes) to 0.107 (hips)
SKELETON_COLOR = (255, 255, 255)


def register_coco_json(name: str, json_file: str | Path, image_root: str | Path) -> None:
    """Check a dataset in COCO's format and register it with Detectron2 as `name`.

    What hand-made files often lack and COCO's evaluation reads is filled in (`iscrowd`, `area`,
    `num_keypoints`, keypoints of annotations without any, unique annotation ids from 1, `info`);
    the completed JSON is then kept in Detectron2's cache, and yours is left as it is.

    Keypoints are taken from the categories' `keypoints` and `skeleton`: all categories that have
    keypoints share one list of names, and names that differ only in "left" and "right" swap
    places when an image is flipped. Registering a name again replaces what it stood for.

    Args:
        name: the name for ``cfg.DATASETS``.
        json_file: annotations in COCO's format; category ids may be any distinct integers.
        image_root: the folder that the `file_name` of each image is relative to.

    Raises:
        FileNotFoundError: the JSON file, the image folder or an image does not exist.
        ValueError: the file is not JSON, not in COCO's format, or contradicts itself.
    """
    coco = read_coco(Path(json_file))
    try:
        _check_annotations(coco)
        keypoint_metadata = _keypoint_metadata(coco["categories"])
        filled_in = _fill_in(coco, num_keypoints=len(keypoint_metadata.get("keypoint_names", [])))
    except ValueError as error:
        raise ValueError(f"{json_file}: {error}") from error
    _check_images(coco["images"], Path(image_root), json_file)
    if filled_in:
        complete_file = _write_to_cache(coco)
        logger.info(f"{json_file} lacks {', '.join(filled_in)}: completed in {complete_file}")
        json_file = complete_file

    classes = [c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])]
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    metadata = {"thing_classes": classes, **keypoint_metadata}
    register_coco_instances(name, metadata, str(json_file), str(image_root))


def configure_for_dataset(cfg: CfgNode, train_name: str, val_name: str) -> None:
    """Fit a config, in place, to a pair of registered datasets, and log what was set.

    Sets DATASETS.TRAIN and TEST, MODEL.ROI_HEADS.NUM_CLASSES and MODEL.RETINANET.NUM_CLASSES;
    with MODEL.MASK_ON, INPUT.MASK_FORMAT to "bitmask" if there are RLE masks, which Detectron2's
    "polygon" cannot hold; with MODEL.KEYPOINT_ON, MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, and
    TEST.KEYPOINT_OKS_SIGMAS unless it has the right length: COCO's own for 17 keypoints, else
    0.05 for each.

    Args:
        cfg: the config to change.
        train_name: the registered dataset to train on.
        val_name: the registered dataset to evaluate on; may be the same.

    Raises:
        ValueError: the two datasets differ in their classes or keypoints, or lack the masks or
            keypoints that the config's model is to learn.
    """
    train, val = MetadataCatalog.get(train_name), MetadataCatalog.get(val_name)
    annotations = {name: _load_annotations(name) for name in (train_name, val_name)}
    for key in ("thing_classes", "keypoint_names"):
        if train.get(key) != val.get(key):
            raise ValueError(
                f"{train_name!r} and {val_name!r} differ in their {key} (in the order of their "
                f"ids): {train.get(key)} and {val.get(key)}"
            )
    num_classes = len(train.thing_classes)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train_name,), (val_name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    summary = f"{num_classes} classes ({', '.join(train.thing_classes)})"
    if cfg.MODEL.MASK_ON:
        _configure_masks(cfg, annotations)
        summary += f", mask format {cfg.INPUT.MASK_FORMAT}"
    if cfg.MODEL.KEYPOINT_ON:
        _configure_keypoints(cfg, train_name, train.get("keypoint_names", []), annotations)
        summary += f", {cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS} keypoints"
        summary += f" with OKS sigmas {cfg.TEST.KEYPOINT_OKS_SIGMAS or 'of COCO'}"
    logger.info(f"Configured for {train_name!r} and {val_name!r}: {summary}")


def _load_annotations(name: str) -> list[Record]:
    return [a for record in DatasetCatalog.get(name) for a in record["annotations"]]


def _configure_masks(cfg: CfgNode, annotations: dict[str, list[Record]]) -> None:
    for name, entries in annotations.items():
        num_without = sum("segmentation" not in a for a in entries)
        if num_without:
            raise ValueError(
                f"{num_without} of {len(entries)} annotations of {name!r} have no segmentation, "
                "and MODEL.MASK_ON needs one on each; set MODEL.MASK_ON False to train boxes only"
            )
        if any(isinstance(a["segmentation"], dict) and not a.get("iscrowd", 0) for a in entries):
            cfg.INPUT.MASK_FORMAT = "bitmask"


def _configure_keypoints(
    cfg: CfgNode, train_name: str, keypoint_names: list[str], annotations: dict[str, list[Record]]
) -> None:
    if not keypoint_names:
        raise ValueError(
            f"MODEL.KEYPOINT_ON is set, but no category of {train_name!r} has a list 'keypoints' "
            "with the names of its keypoints"
        )
    for name, entries in annotations.items():
        if not any(v > 0 for a in entries for v in a["keypoints"][2::3]):
            raise ValueError(
                f"MODEL.KEYPOINT_ON is set, but no annotation of {name!r} has a keypoint with a "
                "visibility above 0"
            )
    num_keypoints = len(keypoint_names)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = num_keypoints
    if len(cfg.TEST.KEYPOINT_OKS_SIGMAS) != num_keypoints:
        is_person = num_keypoints == NUM_PERSON_KEYPOINTS
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [] if is_person else [UNIFORM_OKS_SIGMA] * num_keypoints


def _check_images(images: list[Record], image_root: Path, json_file: str | Path) -> None:
    if not image_root.is_dir():
        raise FileNotFoundError(f"The image folder {image_root} does not exist")
    for image in images:
        # Unlike pathlib's, this takes any text for a name.
        if not os.path.isfile(image_root / image["file_name"]):
            raise FileNotFoundError(
                f"The image {image['file_name']!r} (id {image['id']}) is not in {image_root}, "
                f"though {json_file} lists it"
            )


def _check_annotations(coco: Record) -> None:
    annotations = coco["annotations"]
    known = {key: {entry["id"] for entry in coco[key]} for key in ("images", "categories")}
    for i, annotation in enumerate(annotations):
        where = f"annotations[{i}]"
        for key, section in (("category_id", "categories"), ("image_id", "images")):
            if annotation[key] not in known[section]:
                raise ValueError(f"{where} has {key} {annotation[key]!r}, not among the {section}")
    if all(max(annotation["bbox"]) <= 1 for annotation in annotations):
        raise ValueError("every bbox lies within [0, 1]; COCO's are in pixels: x, y, width, height")


def _keypoint_metadata(categories: list[Record]) -> dict[str, Any]:
    """What Detectron2's metadata says of keypoints; nothing if no category has any."""
    with_keypoints = [c for c in categories if c.get("keypoints")]
    if not with_keypoints:
        return {}
    names = with_keypoints[0]["keypoints"]
    for category in with_keypoints:
        if category["keypoints"] != names:
            raise ValueError(
                f"the categories {with_keypoints[0]['name']!r} and {category['name']!r} have "
                "different lists of keypoints; Detectron2's keypoint head has one for all"
            )
    skeleton = with_keypoints[0].get("skeleton") or []
    for limb in skeleton:
        if not all(1 <= i <= len(names) for i in limb):
            raise ValueError(f"the skeleton's {limb} is not a pair out of 1...{len(names)}")
    mirrored = {name: name.replace("left", "right").replace("Left", "Right") for name in names}
    return {
        "keypoint_names": names,
        "keypoint_flip_map": [(a, b) for a, b in mirrored.items() if a != b and b in names],
        "keypoint_connection_rules": [
            (names[a - 1], names[b - 1], SKELETON_COLOR) for a, b in skeleton
        ],
    }


def _fill_in(coco: Record, num_keypoints: int) -> list[str]:
    """Complete a dataset in place; return the names of what was filled in."""
    filled_in = {"info"} - coco.keys()
    coco.setdefault("info", {})
    annotations = coco["annotations"]
    ids = [annotation.get("id") for annotation in annotations]
    if not all(ids) or len(set(ids)) < len(ids):  # COCO's evaluation takes id 0 for "no match"
        filled_in.add("distinct ids from 1")
        for i, annotation in enumerate(annotations, start=1):
            annotation["id"] = i
    images = {image["id"]: image for image in coco["images"]}
    for i, annotation in enumerate(annotations):
        values = _missing_values(annotation, images[annotation["image_id"]], num_keypoints)
        annotation.update(values)
        filled_in |= values.keys()
        if num_keypoints and len(annotation["keypoints"]) != 3 * num_keypoints:
            raise ValueError(
                f"annotations[{i}] has {len(annotation['keypoints'])} numbers in 'keypoints'; "
                f"{num_keypoints} keypoints (x, y, visibility) have {3 * num_keypoints}"
            )
    return sorted(filled_in)


def _missing_values(annotation: Record, image: Record, num_keypoints: int) -> Record:
    values: Record = {}
    if annotation.get("iscrowd") is None:
        values["iscrowd"] = 0
    if not annotation.get("area"):
        values["area"] = _area(annotation, image)
    if num_keypoints:
        keypoints = annotation.get("keypoints")
        if not keypoints:
            keypoints = values["keypoints"] = [0] * (3 * num_keypoints)
        if annotation.get("num_keypoints") is None:
            values["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])
    return values


def _area(annotation: Record, image: Record) -> float:
    """The mask's area, or the box's where there is no mask, in square pixels."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return float(mask_util.area(segmentation))
    rle = mask_util.frPyObjects(segmentation, image["height"], image["width"])
    return float(mask_util.area(mask_util.merge(rle) if isinstance(rle, list) else rle))


def _write_to_cache(coco: Record) -> Path:
    """Write a JSON file named after its content: what a process reads, no other one changes."""
    text = json.dumps(coco)
    folder = Path(get_cache_dir()) / "nl_detectron" / "coco_json"
    folder.mkdir(parents=True, exist_ok=True)
    json_file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    draft = json_file.with_suffix(f".{uuid.uuid4().hex}")
    draft.write_text(text)
    draft.replace(json_file)
    return json_file
