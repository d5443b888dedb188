"""What is wrong with the annotations of a dataset in COCO's format, beside their format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from nl_detectron.data.coco_format import MAX_AREA, Finding, Record, repeated

Sizes = dict[Any, tuple[float, float]]  # of images, by their ids: width, height


def check_annotations(
    annotations: list[Record], known: dict[str, set[Any]], sizes: Sizes, num_keypoints: int
) -> Iterator[Finding]:
    """
    Find what is wrong with annotations in the right format.

    ``known`` are the ids of images and categories, ``sizes`` are of images with nothing wrong.
    """
    yield from repeated(annotations, "id", False)
    for key, section in (("category_id", "categories"), ("image_id", "images")):
        if not {annotation[key] for annotation in annotations} <= known[section]:
            yield from _unknown(annotations, key, section, known[section])
    if annotations and all(annotation.get("iscrowd") for annotation in annotations):
        yield False, "all crowds", -1, "every annotation has iscrowd 1: there is none to train on"
    places = [i for i, annotation in enumerate(annotations) if annotation["image_id"] in sizes]
    if places:
        placed = [annotations[i] for i in places]
        for check in (_check_boxes, _check_areas, _check_masks):
            for is_error, kind, i, text in check(placed, sizes):
                yield is_error, kind, places[i] if i >= 0 else i, text
    if num_keypoints:
        yield from _check_keypoints(annotations, num_keypoints)


def _unknown(
    annotations: list[Record], key: str, section: str, known: set[Any]
) -> Iterator[Finding]:
    texts = {str(id_) for id_ in known}
    for i, annotation in enumerate(annotations):
        if (id_ := annotation[key]) not in known:
            is_other_type = str(id_) in texts
            cause = ", where it is a number and no text, or the reverse" if is_other_type else ""
            yield True, f"unknown {key}", i, f"has {key} {id_!r}, not among the {section}{cause}"


def _check_boxes(annotations: list[Record], sizes: Sizes) -> Iterator[Finding]:
    boxes = _array(annotation["bbox"] for annotation in annotations).reshape(-1, 4)
    ends = _array(sizes[annotation["image_id"]] for annotation in annotations).reshape(-1, 2)
    if boxes.max() <= 1:
        text = "every bbox lies within [0, 1]; COCO's are in pixels: x, y, width, height"
        yield True, "boxes not in pixels", -1, text
    starts, stops = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    negative = (boxes[:, 2:] < 0).any(1)
    empty = (boxes[:, 2:] == 0).any(1) & ~negative
    outside = ((starts >= ends) | (stops <= 0)).any(1) & ~negative & ~empty
    useless = negative | empty | outside
    beyond = ((starts < -1) | (stops > ends + 1)).any(1) & ~useless
    if useless.all():
        text = "no annotation has a bbox [x, y, width, height] with an area within its picture"
        yield True, "no box", -1, text
    flags = {
        "negative box": (negative, "of negative size,"),
        "empty box": (empty, "which is empty,"),
        "box outside": (outside, "which lies outside,"),
        "box partly outside": (beyond, "which reaches more than a pixel out,"),
    }
    for kind, (flag, said) in flags.items():
        for i in np.flatnonzero(flag).tolist():
            width, height = sizes[annotations[i]["image_id"]]
            text = f"has bbox {annotations[i]['bbox']}, {said} in a picture of {width} x {height}"
            yield False, kind, i, text


def _check_areas(annotations: list[Record], sizes: Sizes) -> Iterator[Finding]:
    """Evaluation leaves out what has an area beyond its ranges, and sorts the rest by area."""
    areas = np.array([annotation.get("area") or 0 for annotation in annotations], np.float64)
    for i in np.flatnonzero((areas < 0) | (areas > MAX_AREA)).tolist():
        text = f"has area {areas[i]:g}, not from 0 to {MAX_AREA:g}: it is computed anew"
        yield False, "wrong area", i, text
    areas = areas[areas != 0]
    if not len(areas) or areas.min() < areas.max() > 1:
        return
    boxes = [a["bbox"][2] * a["bbox"][3] for a in annotations if a.get("area")]
    if areas.min() == areas.max() and min(boxes) < max(boxes):
        text = f"every area is {areas[0]:g}, though the boxes differ: APs, APm and APl tell nothing"
        yield False, "one area", -1, text
    elif areas.max() <= 1 < max(boxes):
        text = "no area is above 1; COCO's are in pixels: APs, APm and APl tell nothing"
        yield False, "areas not in pixels", -1, text


def _check_masks(annotations: list[Record], sizes: Sizes) -> Iterator[Finding]:
    without = []
    for i, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if not segmentation:
            without.append(i)
        elif type(segmentation) is dict:
            width, height = sizes[annotation["image_id"]]
            if segmentation["size"] != [height, width]:
                text = f"[height, width] {segmentation['size']}, its picture [{height}, {width}]"
                yield True, "RLE of another size", i, f"has an RLE of {text}"
    if len(without) < len(annotations):
        for i in without:
            yield False, "no mask", i, "has no segmentation, as others have"


def _check_keypoints(annotations: list[Record], num_keypoints: int) -> Iterator[Finding]:
    length = 3 * num_keypoints
    places = []
    for i, annotation in enumerate(annotations):
        if keypoints := annotation.get("keypoints"):
            if len(keypoints) == length:
                places.append(i)
            else:
                text = f"{num_keypoints} keypoints (x, y, visibility) have {length}"
                text = f"has {len(keypoints)} numbers in 'keypoints'; {text}"
                yield True, "wrong number of keypoints", i, text
    points = _array(annotations[i]["keypoints"] for i in places).reshape(-1, num_keypoints, 3)
    strange = ~np.isin(points[..., 2], (0, 1, 2))
    counts = (points[..., 2] > 0).sum(1).tolist()
    for row, i in enumerate(places):
        if strange[row].any():
            value = points[row, strange[row], 2][0]
            yield False, "wrong visibility", i, f"has a visibility {value:g}, not 0, 1 or 2"
        declared = annotations[i].get("num_keypoints")
        if declared is not None and declared != counts[row]:
            text = f"has num_keypoints {declared}, but {counts[row]} with a visibility above 0"
            yield False, "wrong num_keypoints", i, text


def _array(rows: Iterable[Sequence[float]]) -> np.ndarray:
    """The numbers of all rows, one after the other: (N,) float64."""
    return np.fromiter(chain.from_iterable(rows), np.float64)
