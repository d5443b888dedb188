"""What is wrong with the annotations of a dataset in COCO's format, beside their format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from nl_detectron.data.coco_format import MAX_AREA, Entries, Finding, repeated

Sizes = dict[Any, tuple[float, float]]  # image id to width, height


def check_annotations(
    annotations: Entries, known: dict[str, set[Any]], sizes: Sizes, num_keypoints: int
) -> Iterator[Finding]:
    """Find what is wrong with annotations in the right format.

    ``known`` are the ids of images and categories, ``sizes`` are of images with nothing wrong.
    """
    yield from repeated(annotations, "id", False)
    for key, section in (("category_id", "categories"), ("image_id", "images")):
        if not {annotation[key] for annotation in annotations.values()} <= known[section]:
            yield from _unknown(annotations, key, section, known[section])
    if annotations and all(annotation.get("iscrowd") for annotation in annotations.values()):
        yield False, "all crowds", None, "every annotation has iscrowd 1: there is none to train on"
    placed = {i: a for i, a in annotations.items() if a["image_id"] in sizes}
    if placed:
        yield from _check_boxes(placed, sizes)
        yield from _check_areas(placed)
        yield from _check_masks(placed, sizes)
    if num_keypoints:
        yield from _check_keypoints(annotations, num_keypoints)


def _unknown(annotations: Entries, key: str, section: str, known: set[Any]) -> Iterator[Finding]:
    texts = {str(id_) for id_ in known}
    for i, annotation in annotations.items():
        if (id_ := annotation[key]) not in known:
            is_other_type = str(id_) in texts
            cause = ", where it is a number and no text, or the reverse" if is_other_type else ""
            yield True, f"unknown {key}", i, f"has {key} {id_!r}, not among the {section}{cause}"


def _check_boxes(annotations: Entries, sizes: Sizes) -> Iterator[Finding]:
    places = np.array([*annotations])
    boxes = _array(a["bbox"] for a in annotations.values()).reshape(-1, 4)
    ends = _array(sizes[a["image_id"]] for a in annotations.values()).reshape(-1, 2)
    if boxes.max() <= 1:
        text = "every bbox lies within [0, 1]; COCO's are in pixels: x, y, width, height"
        yield True, "boxes not in pixels", None, text
    starts, stops = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    negative = (boxes[:, 2:] < 0).any(1)
    empty = (boxes[:, 2:] == 0).any(1) & ~negative
    outside = ((starts >= ends) | (stops <= 0)).any(1) & ~negative & ~empty
    useless = negative | empty | outside
    beyond = ((starts < -1) | (stops > ends + 1)).any(1) & ~useless
    if useless.all():
        text = "no annotation has a bbox [x, y, width, height] with an area within its picture"
        yield True, "no box", None, text
    for kind, flags, said in (
        ("negative box", negative, "of negative size,"),
        ("empty box", empty, "which is empty,"),
        ("box outside", outside, "which lies outside,"),
        ("box partly outside", beyond, "which reaches more than a pixel out,"),
    ):
        for i in places[flags].tolist():
            width, height = sizes[annotations[i]["image_id"]]
            text = f"has bbox {annotations[i]['bbox']}, {said} in a picture of {width} x {height}"
            yield False, kind, i, text


def _check_areas(annotations: Entries) -> Iterator[Finding]:
    """Evaluation leaves out what has an area beyond its ranges, and sorts the rest by area."""
    areas = {i: a["area"] for i, a in annotations.items() if a.get("area")}
    for i, area in areas.items():
        if not 0 < area <= MAX_AREA:
            text = f"has area {area:g}, not from 0 to {MAX_AREA:g}: it is computed anew"
            yield False, "wrong area", i, text
    least, largest = min(areas.values(), default=0), max(areas.values(), default=0)
    boxes = [annotations[i]["bbox"][2] * annotations[i]["bbox"][3] for i in areas] or [0]
    if least == largest and min(boxes) < max(boxes):
        text = f"every area is {largest:g}, though the boxes differ: APs, APm and APl tell nothing"
        yield False, "one area", None, text
    elif largest <= 1 < max(boxes):
        text = "no area is above 1; COCO's are in pixels: APs, APm and APl tell nothing"
        yield False, "areas not in pixels", None, text


def _check_masks(annotations: Entries, sizes: Sizes) -> Iterator[Finding]:
    some_have_one = any(annotation.get("segmentation") for annotation in annotations.values())
    for i, annotation in annotations.items():
        segmentation = annotation.get("segmentation")
        width, height = sizes[annotation["image_id"]]
        if not segmentation and some_have_one:
            yield False, "no mask", i, "has no segmentation, as others have"
        if type(segmentation) is dict and segmentation["size"] != [height, width]:
            text = f"[height, width] {segmentation['size']}, its picture [{height}, {width}]"
            yield True, "RLE of another size", i, f"has an RLE of {text}"


def _check_keypoints(annotations: Entries, num_keypoints: int) -> Iterator[Finding]:
    for i, annotation in annotations.items():
        keypoints = annotation.get("keypoints")
        if not keypoints:
            continue
        if len(keypoints) != 3 * num_keypoints:
            text = f"{num_keypoints} keypoints (x, y, visibility) have {3 * num_keypoints}"
            text = f"has {len(keypoints)} numbers in 'keypoints'; {text}"
            yield True, "wrong number of keypoints", i, text
            continue
        visibilities, declared = keypoints[2::3], annotation.get("num_keypoints")
        if strange := [v for v in visibilities if v not in (0, 1, 2)]:
            yield False, "wrong visibility", i, f"has a visibility {strange[0]:g}, not 0, 1 or 2"
        count = sum(v > 0 for v in visibilities)
        if declared is not None and declared != count:
            text = f"has num_keypoints {declared}, but {count} with a visibility above 0"
            yield False, "wrong num_keypoints", i, text


def _array(rows: Iterable[Sequence[float]]) -> np.ndarray:
    """The numbers of all rows, one after the other: (N,) float64."""
    return np.fromiter(chain.from_iterable(rows), np.float64)
