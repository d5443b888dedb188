"""What is wrong with a dataset in COCO's format: the one place that says so."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nl_detectron.data.coco_format import Record, format_problems
from nl_detectron.data.coco_records import keypoint_metadata
from nl_detectron.data.pictures import picture_problem

MISSING_PICTURE = "missing picture"
_WIDE, _TOO_WIDE = 20, 1000  # longer : shorter side; beyond the second, resizing leaves no pixel
_UNTRAINABLE = {"negative box", "empty box", "box outside", "repeated file"}  # though bearable

_Finding = tuple[bool, str, int, str]  # is_error, kind, index (-1: of the whole), text
Sizes = dict[Any, tuple[float, float]]  # of images, by their ids: width, height


class Problem(NamedTuple):
    """One thing that is wrong with an entry of the file, or with the whole (``place`` is None)."""

    is_error: bool  # Detectron2 cannot live with it; otherwise it is a warning
    kind: str
    section: str  # of the file: "images", "annotations" or "categories"
    place: int | None  # its index in the section
    text: str  # one line, which names the entry


def check_coco(coco: Record, image_root: Path, pictures: str = "present") -> list[Problem]:
    """
    Args:
        coco: what :func:`read_coco` returned.
        image_root: the folder that the ``file_name`` of each image is relative to.
        pictures: what is looked at: "present", whether the files are there; "header", also their
            recorded size, their bits and whether they end too early; "decoded", all of them.

    Returns:
        All problems, with those of a value's kind first. An entry that has such a problem is not
        compared with others.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not image_root.is_dir():
        raise FileNotFoundError(f"The image folder {image_root} does not exist")
    problems: list[Problem] = []
    sound = {}
    for section in ("categories", "images", "annotations"):
        found = _check_format(section, coco[section])
        problems += found
        sound[section] = _others(coco[section], {problem.place for problem in found})
    num_keypoints = 0
    try:
        num_keypoints = len(keypoint_metadata(sound["categories"][1]).get("keypoint_names", ()))
    except ValueError as error:
        problems.append(
            Problem(True, "keypoints of the categories", "categories", None, str(error))
        )
    known = {key: _ids(coco[key]) for key in ("images", "categories")}
    sizes = {image["id"]: (image["width"], image["height"]) for image in sound["images"][1]}
    checks = {
        "categories": _check_categories(sound["categories"][1]),
        "images": _check_images(sound["images"][1], str(image_root), pictures),
        "annotations": _check_annotations(sound["annotations"][1], known, sizes, num_keypoints),
    }
    for section, findings in checks.items():
        places, entries = sound[section]
        for is_error, kind, i, text in findings:
            if i < 0:
                problems.append(Problem(is_error, kind, section, None, text))
                continue
            ids = _ids_of(entries[i])
            name = f"{entries[i]['file_name']!r}{ids} " if section == "images" else ""
            text = f"{section}[{places[i]}] {name}{text}{'' if name else ids}"
            problems.append(Problem(is_error, kind, section, places[i], text))
    return problems


def in_one_line(problems: Sequence[Problem]) -> str:
    """
    Args:
        problems: one or more.

    Returns:
        The first one and, where there are more, how many there are of each kind.
    """
    if len(problems) == 1:
        return problems[0].text
    counts = ", ".join(f"{count} x {kind}" for kind, count in count_kinds(problems).items())
    return f"{problems[0].text}; {len(problems)} in all ({counts}): tools/check_data.py lists them"


def count_kinds(problems: Iterable[Problem]) -> Counter[str]:
    """
    Args:
        problems: any.

    Returns:
        How many there are of each kind.
    """
    return Counter(problem.kind for problem in problems)


def without_bad(coco: Record, problems: Iterable[Problem]) -> Record:
    """
    Args:
        coco: a dataset.
        problems: all of its problems.

    Returns:
        The dataset without the images and annotations that have an error, those that training
        leaves out or takes twice, and the annotations of images that are left out. Problems of
        categories stay.
    """
    drop: dict[str, set[int | None]] = {"images": set(), "annotations": set(), "categories": set()}
    for problem in problems:
        if problem.is_error or problem.kind in _UNTRAINABLE:
            drop[problem.section].add(problem.place)
    images = [image for i, image in enumerate(coco["images"]) if i not in drop["images"]]
    ids = {image["id"] for image in images}
    annotations = [
        annotation
        for i, annotation in enumerate(coco["annotations"])
        if i not in drop["annotations"] and annotation["image_id"] in ids
    ]
    return {**coco, "images": images, "annotations": annotations}


def _check_format(section: str, entries: list[Any]) -> list[Problem]:
    return [
        Problem(True, kind, section, i, f"{section}[{i}] {text}{_ids_of(entries[i])}")
        for i, kind, text in format_problems(section, entries)
    ]


def _others(entries: list[Any], places: set[int | None]) -> tuple[Sequence[int], list[Record]]:
    """The places of the others, and the others."""
    if not places:
        return range(len(entries)), entries
    others = [i for i in range(len(entries)) if i not in places]
    return others, [entries[i] for i in others]


def _ids_of(entry: Any) -> str:
    """For example " (id 3, image_id 7)"."""
    keys = [key for key in ("id", "image_id") if isinstance(entry, dict) and key in entry]
    ids = ", ".join(f"{key} {str(entry[key])[:40]}" for key in keys)
    return f" ({ids})" if ids else ""


def _ids(entries: list[Any]) -> set[Any]:
    ids = (entry.get("id") for entry in entries if isinstance(entry, dict))
    return {id_ for id_ in ids if isinstance(id_, (int, str))}


def _check_categories(categories: list[Record]) -> Iterator[_Finding]:
    yield from _repeated(categories, "id", True)
    yield from _repeated(categories, "name", False)


def _repeated(entries: list[Record], key: str, is_error: bool) -> Iterator[_Finding]:
    """All entries of which there are several; where the first one may stay, the others."""
    values = [entry.get(key) for entry in entries]
    if len(set(values)) == len(values):
        return
    counts, seen = Counter(values), set()
    for i, value in enumerate(values):
        if value is not None and counts[value] > 1 and (is_error or value in seen):
            kind = "repeated file" if key == "file_name" else f"repeated {key}"
            yield is_error, kind, i, f"has {key} {value!r}, as have {counts[value] - 1} others"
        seen.add(value)


def _check_images(images: list[Record], root: str, pictures: str) -> Iterator[_Finding]:
    if len({type(image["id"]) for image in images}) > 1:
        yield True, "mixed ids", -1, "some images have numbers for ids, and others texts"
    yield from _repeated(images, "id", True)
    yield from _repeated(images, "file_name", False)
    most = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 30)
    listings: dict[str, set[str]] = {}
    looked_at = []
    for i, image in enumerate(images):
        width, height = image["width"], image["height"]
        if max(width, height) > _WIDE * min(width, height) or width * height > most:
            is_error = max(width, height) > _TOO_WIDE * min(width, height) or width * height > most
            yield is_error, "extreme shape", i, f"is {width} x {height}: extreme"
        path = os.path.join(root, image["file_name"])
        if not _is_file(path, listings):
            yield True, MISSING_PICTURE, i, f"is not in {root}"
        elif pictures != "present":
            looked_at.append((i, path, width, height))
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # of palettes, broken EXIF data and the like
        decode = pictures == "decoded"
        texts = pool.map(lambda look: picture_problem(*look[1:], decode=decode), looked_at)
        for (i, *_), text in zip(looked_at, texts):
            if text:
                yield True, "bad picture", i, text


def _is_file(path: str, listings: dict[str, set[str]]) -> bool:
    """``os.path.isfile``, but each folder is listed once: far faster for 100,000 files of it."""
    folder, name = os.path.split(path)
    if folder not in listings:
        try:
            listings[folder] = {entry.name for entry in os.scandir(folder) if entry.is_file()}
        except (OSError, ValueError):
            listings[folder] = set()
    return name in listings[folder] or os.path.isfile(path)


def _check_annotations(
    annotations: list[Record], known: dict[str, set[Any]], sizes: Sizes, num_keypoints: int
) -> Iterator[_Finding]:
    """``known`` are the ids of images and categories, ``sizes`` those of the images in order."""
    yield from _repeated(annotations, "id", False)
    for key, section in (("category_id", "categories"), ("image_id", "images")):
        if not {annotation[key] for annotation in annotations} <= known[section]:
            for i, annotation in enumerate(annotations):
                if annotation[key] not in known[section]:
                    text = f"has {key} {annotation[key]!r}, not among the {section}"
                    yield True, f"unknown {key}", i, text
    places = [i for i, annotation in enumerate(annotations) if annotation["image_id"] in sizes]
    if places:
        placed = [annotations[i] for i in places]
        for check in (_check_boxes, _check_masks):
            for is_error, kind, i, text in check(placed, sizes):
                yield is_error, kind, places[i] if i >= 0 else i, text
    if num_keypoints:
        yield from _check_keypoints(annotations, num_keypoints)


def _check_boxes(annotations: list[Record], sizes: Sizes) -> Iterator[_Finding]:
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


def _check_masks(annotations: list[Record], sizes: Sizes) -> Iterator[_Finding]:
    for i, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if type(segmentation) is dict:
            width, height = sizes[annotation["image_id"]]
            if segmentation["size"] != [height, width]:
                text = f"[height, width] {segmentation['size']}, its picture [{height}, {width}]"
                yield True, "RLE of another size", i, f"has an RLE of {text}"


def _check_keypoints(annotations: list[Record], num_keypoints: int) -> Iterator[_Finding]:
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
