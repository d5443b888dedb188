"""From a sound dataset in COCO's format to what Detectron2 trains on and evaluates with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pycocotools.mask as mask_util
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import BoxMode
from pycocotools.coco import COCO

from nl_detectron.data.coco_format import Record, no_garbage, read_coco

SKELETON_COLOR = (255, 255, 255)


def keypoint_metadata(categories: list[Record]) -> dict[str, Any]:
    """
    Args:
        categories: COCO's.

    Returns:
        ``keypoint_names``, ``keypoint_flip_map`` and ``keypoint_connection_rules`` of Detectron2's
        metadata; nothing if no category has keypoints.

    Raises:
        ValueError: categories have different keypoints, or a skeleton has unknown ones.
    """
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


def fill_in(coco: Record, *, areas: bool) -> list[str]:
    """
    Complete a dataset in place with what hand-made files often lack: `iscrowd`, `num_keypoints`,
    keypoints of annotations without any, distinct annotation ids from 1 and `info`.

    Args:
        coco: a dataset without errors.
        areas: also fill in `area`, which is read in evaluation only, and takes long.

    Returns:
        The names of what was missing, `area` included, in order.
    """
    missing = {"info"} - coco.keys()
    coco.setdefault("info", {})
    annotations = coco["annotations"]
    ids = [annotation.get("id") for annotation in annotations]
    if not all(ids) or len(set(ids)) < len(ids):  # COCO's evaluation takes id 0 for "no match"
        missing.add("distinct ids from 1")
        for i, annotation in enumerate(annotations, start=1):
            annotation["id"] = i
    images = {image["id"]: image for image in coco["images"]}
    num_keypoints = len(keypoint_metadata(coco["categories"]).get("keypoint_names", ()))
    for annotation in annotations:
        if annotation.get("iscrowd") is None:
            missing.add("iscrowd")
            annotation["iscrowd"] = 0
        if not annotation.get("area"):
            missing.add("area")
            if areas:
                annotation["area"] = _area(annotation, images[annotation["image_id"]])
        if num_keypoints:
            if not annotation.get("keypoints"):
                missing.add("keypoints")
                annotation["keypoints"] = [0] * (3 * num_keypoints)
            if annotation.get("num_keypoints") is None:
                missing.add("num_keypoints")
                annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
    return sorted(missing)


def _area(annotation: Record, image: Record) -> float:
    """The mask's area, or the box's where there is no mask, in square pixels."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return float(mask_util.area(segmentation))
    rle = mask_util.frPyObjects(segmentation, image["height"], image["width"])
    return float(mask_util.area(mask_util.merge(rle) if isinstance(rle, list) else rle))


def to_records(coco: Record, image_root: str | Path) -> list[Record]:
    """
    Args:
        coco: a dataset without errors, filled in. Its annotations lend their lists.
        image_root: the folder that the ``file_name`` of each image is relative to.

    Returns:
        What Detectron2's ``load_coco_json`` returns for the file, which is not read again: a record
        for each image, in the order of their ids, with categories counted from 0.
    """
    categories = contiguous_ids(coco)
    records: dict[Any, Record] = {}
    for image in sorted(coco["images"], key=lambda image: image["id"]):
        records[image["id"]] = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
    for annotation in coco["annotations"]:
        instance = {
            "iscrowd": annotation["iscrowd"],
            "bbox": annotation["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": categories[annotation["category_id"]],
        }
        if keypoints := annotation.get("keypoints"):
            # COCO's are indices of pixels, Detectron2's are where the middle of the pixel is.
            instance["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(keypoints)]
        if segmentation := annotation.get("segmentation"):
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
                segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
            instance["segmentation"] = segmentation
        records[annotation["image_id"]]["annotations"].append(instance)
    return list(records.values())


def contiguous_ids(coco: Record) -> dict[int, int]:
    """
    Args:
        coco: a dataset.

    Returns:
        Detectron2's number, from 0, of each category id.
    """
    return {
        id_: i for i, id_ in enumerate(sorted(category["id"] for category in coco["categories"]))
    }


class CompletingCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, also for files that lack something: see :func:`fill_in`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """
        Args:
            *args: as ``COCOEvaluator`` takes them.
            **options: as ``COCOEvaluator`` takes them.
        """
        # Detectron2 has no other way to say what reads the file.
        with patch.object(coco_evaluation, "COCO", CompletedCOCO):
            super().__init__(*args, **options)


class CompletedCOCO(COCO):
    """COCO's own reader, also for files that lack something: see :func:`fill_in`."""

    @no_garbage()
    def __init__(self, annotation_file: str) -> None:
        """
        Args:
            annotation_file: a dataset in COCO's format, without errors.
        """
        super().__init__()
        self.dataset = read_coco(Path(annotation_file))
        fill_in(self.dataset, areas=True)
        self.createIndex()
