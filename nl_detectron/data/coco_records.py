"""From a sound dataset in COCO's format to what Detectron2 trains on and evaluates with."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from nl_detectron.data.coco_format import MAX_AREA, Record, no_garbage, read_coco
from nl_detectron.data.keypoints import keypoint_metadata

_MAX_ID = 1 << 53  # COCO's evaluation keeps annotation ids as floats


def fill_in(coco: Record, *, areas: bool) -> list[str]:
    """Complete a dataset without errors in place with what hand-made files often lack or write
    otherwise: whole sizes of images and RLEs, `iscrowd`, `num_keypoints`, keypoints of annotations
    without any, distinct annotation ids from 1 and `info`; with ``areas``, which evaluation alone
    reads and which takes long, also `area` where it is 0 or nothing that COCO's evaluation counts.
    Return the names of what was missing, `area` included, in order."""
    missing = {"info"} - coco.keys()
    coco.setdefault("info", {})
    annotations = coco["annotations"]
    if not _are_good_ids([annotation.get("id") for annotation in annotations]):
        missing.add("distinct ids from 1")
        for i, annotation in enumerate(annotations, start=1):
            annotation["id"] = i
    for image in coco["images"]:  # some tools write 128.0
        image["height"], image["width"] = int(image["height"]), int(image["width"])
    images = {image["id"]: image for image in coco["images"]}
    num_keypoints = len(keypoint_metadata(coco["categories"]).get("keypoint_names", ()))
    for annotation in annotations:
        if annotation.get("iscrowd") is None:
            missing.add("iscrowd")
            annotation["iscrowd"] = 0
        segmentation = annotation.get("segmentation")
        if type(segmentation) is dict:
            segmentation["size"] = [int(side) for side in segmentation["size"]]
        if not 0 < (annotation.get("area") or 0) <= MAX_AREA:
            missing.add("area")
            if areas:
                annotation["area"] = _area(annotation, images[annotation["image_id"]])
        if num_keypoints:
            if not annotation.get("keypoints"):
                missing.add("keypoints")
                annotation["keypoints"] = [0] * (3 * num_keypoints)
            if not annotation.get("num_keypoints"):  # with 0, evaluation leaves it out
                num_visible = sum(v > 0 for v in annotation["keypoints"][2::3])
                if num_visible or "num_keypoints" not in annotation:
                    missing.add("num_keypoints")
                annotation["num_keypoints"] = num_visible
    return sorted(missing)


def _are_good_ids(ids: list[Any]) -> bool:
    """COCO's evaluation takes id 0 for "no match"."""
    return {int}.issuperset(map(type, ids)) and (
        not ids or (min(ids) > 0 and max(ids) <= _MAX_ID and len(set(ids)) == len(ids))
    )


def _area(annotation: Record, image: Record) -> float:
    """The mask's area, or the box's where there is no mask, in square pixels."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    if isinstance(segmentation, list):
        segmentation = mask_util.frPyObjects(segmentation, image["height"], image["width"])
        return float(mask_util.area(mask_util.merge(segmentation)))
    return float(mask_util.area(_compressed(segmentation)))


def _compressed(rle: Record) -> Record:
    is_list = isinstance(rle["counts"], list)
    return mask_util.frPyObjects(rle, *rle["size"]) if is_list else rle


def to_records(coco: Record, image_root: str | Path) -> list[Record]:
    """Make what Detectron2's ``load_coco_json`` returns for a file without errors, filled in: a
    record for each image, in the order of their ids, with categories counted from 0. It shares
    lists."""
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
            is_rle = isinstance(segmentation, dict)
            instance["segmentation"] = _compressed(segmentation) if is_rle else segmentation
        records[annotation["image_id"]]["annotations"].append(instance)
    return list(records.values())


def contiguous_ids(coco: Record) -> dict[int, int]:
    """Number the category ids from 0, in their order, as Detectron2 does."""
    ids = sorted(category["id"] for category in coco["categories"])
    return {id_: i for i, id_ in enumerate(ids)}


class CompletingCOCOEvaluator(COCOEvaluator):
    """Evaluates as Detectron2's evaluator does, also on files that lack something: see
    :func:`register_coco_json`. Of a set without annotations the predictions are written, and a line
    in the log says that there is no AP.

    Args:
        dataset_name: the registered dataset to evaluate on.
        *args, **options: what else ``COCOEvaluator`` takes.
    """

    def __init__(self, dataset_name: str, *args: Any, **options: Any) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(metadata, "json_file"):  # Detectron2 writes one, which lacks nothing
            super().__init__(dataset_name, *args, **options)
            return
        coco = read_completed(PathManager.get_local_path(metadata.json_file))
        with tempfile.TemporaryDirectory() as folder:
            copy = f"{folder}/completed.json"  # for the only thing that the evaluator reads
            Path(copy).write_text(json.dumps(coco))
            MetadataCatalog[copy] = Metadata(**{**metadata.as_dict(), "json_file": copy})
            try:
                super().__init__(copy, *args, **options)
            finally:
                del MetadataCatalog[copy]


@no_garbage()
def read_completed(json_file: str | Path) -> Record:
    """Read a file as COCO's evaluation needs it: see :func:`fill_in`."""
    coco = read_coco(Path(json_file))
    fill_in(coco, areas=True)
    if not coco["annotations"]:  # by which Detectron2 tells that there is no AP
        del coco["annotations"]
    return coco
