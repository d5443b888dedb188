"""A user's own dataset in COCO's JSON format: check it, register it, fit a config to it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from nl_detectron.data.coco_checks import MISSING_PICTURE, check_coco, in_one_line
from nl_detectron.data.coco_format import Record, no_garbage, read_coco
from nl_detectron.data.coco_records import contiguous_ids, fill_in, to_records
from nl_detectron.data.keypoints import keypoint_metadata

logger = logging.getLogger(__name__)

NUM_PERSON_KEYPOINTS = 17  # COCO's persons, the only ones with measured OKS sigmas
UNIFORM_OKS_SIGMA = 0.05  # for all others; COCO's run from 0.025 (eyes) to 0.107 (hips)


class Facts(NamedTuple):
    """What the annotations of a dataset hold."""

    num_images: int  # with anything to learn
    num_annotations: int
    num_crowds: int
    num_masks: int
    has_rle: bool  # a mask that the "polygon" format cannot hold, on other than a crowd
    has_keypoint: bool  # with a visibility above 0, on other than a crowd


@no_garbage()
def register_coco_json(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    *,
    pictures: str = "present",
    keep_records: bool = False,
) -> None:
    """Check a dataset in COCO's format and register it, anew if need be, with Detectron2 as `name`.

    What hand-made files often lack is filled in whenever it is loaded (`iscrowd`, `num_keypoints`,
    keypoints of annotations without any, unique annotation ids from 1, `info`; for evaluation with
    `CompletingCOCOEvaluator` also `area`); your file is left as it is. What is wrong with it, but
    Detectron2 can live with, is a warning.

    All categories that have keypoints share one list of names, `keypoints`, and names that differ
    only in their side, such as `left_eye` and `right_eye` or `eyeL` and `eyeR`, swap places when an
    image is flipped; the log names the pairs.

    Args:
        name, json_file: for ``cfg.DATASETS``; category ids may be any distinct integers.
        image_root: the folder that the `file_name` of each image is relative to.
        pictures: what is looked at of each: "present", whether the files are there; "header", also
            their recorded size, their bits and whether they end too early; "decoded", all of them.
        keep_records: keep what was read for the first that asks Detectron2's ``DatasetCatalog``
            for it, so that the file is read once. It takes memory until then.

    Raises:
        FileNotFoundError: the JSON file, the image folder or an image does not exist.
        ValueError: the file is not JSON, not in COCO's format, or has another error that Detectron2
            cannot live with; the message is one line.
    """
    coco = read_coco(Path(json_file))
    problems = check_coco(coco, Path(image_root), pictures)
    if errors := [problem for problem in problems if problem.is_error]:
        error_type = FileNotFoundError if errors[0].kind == MISSING_PICTURE else ValueError
        raise error_type(f"{json_file}: {in_one_line(errors)}")
    if problems:
        logger.warning(f"{json_file}: {in_one_line(problems)}")
    if missing := fill_in(coco, areas=False):
        logger.info(f"{json_file} lacks {', '.join(missing)}: filled in where it is loaded")
    metadata = category_metadata(coco["categories"])
    if "keypoint_flip_map" in metadata:
        pairs = ", ".join(" - ".join(pair) for pair in metadata["keypoint_flip_map"])
        logger.info(f"{json_file}: keypoints that swap places in a flip: {pairs or 'none'}")
    records = to_records(coco, image_root)
    kept = [records] if keep_records else []

    @no_garbage()
    def load() -> list[Record]:
        if kept:
            return kept.pop()
        coco = read_coco(Path(json_file))
        fill_in(coco, areas=False)
        return to_records(coco, image_root)

    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        **metadata,
        categories=coco["categories"],
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        annotation_facts=_facts(records),
    )


def category_metadata(categories: list[Record]) -> dict[str, Any]:
    """What COCO's categories tell for Detectron2's metadata: names, ids, and of keypoints."""
    names = {category["id"]: category["name"] for category in categories}
    return {
        "thing_classes": [names[id_] for id_ in sorted(names)],
        "thing_dataset_id_to_contiguous_id": contiguous_ids({"categories": categories}),
        **keypoint_metadata(categories),
    }


def configure_for_dataset(
    cfg: CfgNode, train_name: str, val_name: str, *, eval_only: bool = False
) -> None:
    """Fit a config, in place, to a pair of registered datasets, and log what was set.

    Sets DATASETS.TRAIN and TEST, MODEL.ROI_HEADS.NUM_CLASSES and MODEL.RETINANET.NUM_CLASSES;
    with MODEL.MASK_ON, INPUT.MASK_FORMAT to "bitmask" if there are RLE masks, which Detectron2's
    "polygon" cannot hold; with MODEL.KEYPOINT_ON, MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, and
    TEST.KEYPOINT_OKS_SIGMAS unless it has the right length: COCO's own for 17 keypoints, else
    0.05 for each.

    Args:
        val_name: may be that to train on, or without annotations, as test sets are.
        eval_only: nothing is trained.

    Raises:
        ValueError: the two datasets differ in their classes or keypoints, or lack the masks or
            keypoints that the config's model is to learn, or there is nothing to train on.
    """
    train, val = MetadataCatalog.get(train_name), MetadataCatalog.get(val_name)
    used = [val_name] if eval_only else [train_name, val_name]
    facts = {name: annotation_facts(name) for name in used}
    if not eval_only:
        _check_trainable(train_name, facts[train_name])
    for key in ("thing_classes", *(["keypoint_names"] if cfg.MODEL.KEYPOINT_ON else [])):
        if train.get(key) != val.get(key):
            raise ValueError(
                f"{train_name!r} and {val_name!r} differ in their {key} (in the order of their "
                f"ids): {train.get(key)} and {val.get(key)}"
            )
    num_classes = len(train.thing_classes)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train_name,), (val_name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    summary = f"{num_classes} classes ({', '.join(train.thing_classes)})"
    if cfg.MODEL.MASK_ON:
        _configure_masks(cfg, facts)
        summary += f", mask format {cfg.INPUT.MASK_FORMAT}"
    if cfg.MODEL.KEYPOINT_ON:
        _configure_keypoints(cfg, train_name, train.get("keypoint_names", []), facts)
        summary += f", {cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS} keypoints"
        summary += f" with OKS sigmas {cfg.TEST.KEYPOINT_OKS_SIGMAS or 'of COCO'}"
    logger.info(f"Configured for {train_name!r} and {val_name!r}: {summary}")


def annotation_facts(name: str) -> Facts:
    """What there is to learn in a registered dataset."""
    return MetadataCatalog.get(name).get("annotation_facts") or _facts(DatasetCatalog.get(name))


def _facts(records: list[Record]) -> Facts:
    """What there is to learn; of the one or two million entries, one loop."""
    num_images = num_annotations = num_crowds = num_masks = 0
    has_rle = has_keypoint = False
    for record in records:
        num_images += any(not a.get("iscrowd", 0) for a in record["annotations"])
        for annotation in record["annotations"]:
            num_annotations += 1
            num_masks += "segmentation" in annotation
            if annotation.get("iscrowd", 0):
                num_crowds += 1
                continue
            has_rle = has_rle or type(annotation.get("segmentation")) is dict
            has_keypoint = has_keypoint or any(v > 0 for v in annotation.get("keypoints", ())[2::3])
    return Facts(num_images, num_annotations, num_crowds, num_masks, has_rle, has_keypoint)


def _check_trainable(name: str, facts: Facts) -> None:
    if not facts.num_annotations:
        raise ValueError(f"{name!r} has no annotations: there is nothing to train on")
    if facts.num_crowds == facts.num_annotations:
        raise ValueError(
            f"all {facts.num_annotations} annotations of {name!r} have iscrowd 1, which training "
            "leaves out: there is nothing to train on"
        )


def _configure_masks(cfg: CfgNode, facts: dict[str, Facts]) -> None:
    for name, of in facts.items():
        if of.num_masks < of.num_annotations:
            raise ValueError(
                f"{of.num_annotations - of.num_masks} of {of.num_annotations} annotations of "
                f"{name!r} have no segmentation, and MODEL.MASK_ON needs one on each; leave those "
                "out with tools/check_data.py --drop-bad, or set MODEL.MASK_ON False to train "
                "boxes only"
            )
        if of.has_rle:
            cfg.INPUT.MASK_FORMAT = "bitmask"


def _configure_keypoints(
    cfg: CfgNode, train_name: str, keypoint_names: list[str], facts: dict[str, Facts]
) -> None:
    problem = ""
    without = [name for name, of in facts.items() if of.num_annotations and not of.has_keypoint]
    if not keypoint_names:
        problem = f"no category of {train_name!r} has a list 'keypoints' with the names of its "
        problem += "keypoints, or categories have different ones"
    elif len(set(keypoint_names)) < len(keypoint_names):
        names = ", ".join(keypoint_names)
        problem = f"keypoints of {train_name!r} have the same name: {names}"
    elif without:
        problem = f"no annotation of {without[0]!r} has a keypoint with a visibility above 0"
    if problem:
        raise ValueError(f"MODEL.KEYPOINT_ON is set, but {problem}")
    num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(keypoint_names)
    if len(cfg.TEST.KEYPOINT_OKS_SIGMAS) != num_keypoints:
        is_person = num_keypoints == NUM_PERSON_KEYPOINTS
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [] if is_person else [UNIFORM_OKS_SIGMA] * num_keypoints
