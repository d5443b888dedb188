"""What is wrong with a dataset in COCO's format: the one place that says so."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from nl_detectron.data.coco_annotations import check_annotations
from nl_detectron.data.coco_format import (
    REQUIRED_KEYS,
    Entries,
    Finding,
    Record,
    format_problems,
    repeated,
)
from nl_detectron.data.keypoints import keypoint_metadata, keypoint_warnings
from nl_detectron.data.pictures import picture_problems

MISSING_PICTURE = "missing picture"
# Errors for training alone, which leaves such entries out, takes them twice or cannot take them.
_UNTRAINABLE = {"negative box", "empty box", "box outside", "repeated file", "no mask"}
_WIDE, _TOO_WIDE = 20, 1000  # longer : shorter side; beyond the second, resizing leaves no pixel


class Problem(NamedTuple):
    """One thing that is wrong with an entry of the file, or with the whole (``place`` is None)."""

    is_error: bool  # Detectron2 cannot live with it; otherwise it is a warning
    kind: str
    section: str  # of the file: "images", "annotations" or "categories"
    place: int | None  # its index in the section
    text: str  # one line, which names the entry


def check_coco(coco: Record, image_root: Path, pictures: str = "present") -> list[Problem]:
    """Find all that is wrong with a dataset; what is of a wrong kind comes first, and alone.

    ``pictures`` is as for :func:`register_coco_json`. FileNotFoundError: there is no folder
    ``image_root``.
    """
    if not image_root.is_dir():
        raise FileNotFoundError(f"The image folder {image_root} does not exist")
    problems: list[Problem] = []
    sound: dict[str, Entries] = {}
    for section in REQUIRED_KEYS:
        sound[section] = dict(enumerate(coco[section]))
        for i, kind, text in format_problems(section, coco[section]):
            sound[section].pop(i, None)
            text = f"{section}[{i}] {text}{_ids_of(coco[section][i])}"
            problems.append(Problem(True, kind, section, i, text))
    categories, images, annotations = sound.values()
    num_keypoints = len(keypoint_metadata(categories.values()).get("keypoint_names", ()))
    known = {key: _ids(coco[key]) for key in ("images", "categories")}
    sizes = {image["id"]: (image["width"], image["height"]) for image in images.values()}
    used = {annotation["category_id"] for annotation in annotations.values()}
    checks = {
        "categories": _check_categories(categories, used),
        "images": _check_images(images, str(image_root), pictures),
        "annotations": check_annotations(annotations, known, sizes, num_keypoints),
    }
    for section, findings in checks.items():
        for is_error, kind, place, text in findings:
            if place is not None:
                entry = coco[section][place]
                subject = f"{entry['file_name']!r}{_ids_of(entry)} " if section == "images" else ""
                text = f"{section}[{place}] {subject}{text}{'' if subject else _ids_of(entry)}"
            problems.append(Problem(is_error, kind, section, place, text))
    if not coco["annotations"]:
        text = "there are no annotations: none to train on, and in evaluation no AP"
        problems.append(Problem(False, "no annotations", "annotations", None, text))
    return problems


def in_one_line(problems: Sequence[Problem]) -> str:
    """Say the first problem and, where there are more, how many there are of each kind."""
    if len(problems) == 1:
        return problems[0].text
    text = f"{problems[0].text}; {len(problems)} in all ({counts_of_kinds(problems)})"
    return f"{text}: tools/check_data.py lists them"


def counts_of_kinds(problems: Iterable[Problem]) -> str:
    """For example "2 x empty box, 1 x no mask"."""
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())


def without_bad(coco: Record, problems: Iterable[Problem]) -> Record:
    """Leave out images and annotations that have an error or are of no use in training, and the
    annotations of images that are left out. Problems of categories stay."""
    bad = {(p.section, p.place) for p in problems if p.is_error or p.kind in _UNTRAINABLE}
    images = [image for i, image in enumerate(coco["images"]) if ("images", i) not in bad]
    ids = {image["id"] for image in images}
    annotations = [
        annotation
        for i, annotation in enumerate(coco["annotations"])
        if ("annotations", i) not in bad and annotation["image_id"] in ids
    ]
    return {**coco, "images": images, "annotations": annotations}


def _ids_of(entry: Any) -> str:
    """For example " (id 3, image_id 7)"."""
    keys = [key for key in ("id", "image_id") if isinstance(entry, dict) and key in entry]
    ids = ", ".join(f"{key} {str(entry[key])[:40]}" for key in keys)
    return f" ({ids})" if ids else ""


def _ids(entries: list[Any]) -> set[Any]:
    ids = (entry.get("id") for entry in entries if isinstance(entry, dict))
    return {id_ for id_ in ids if isinstance(id_, (int, str))}


def _check_categories(categories: Entries, used: set[Any]) -> Iterator[Finding]:
    """``used`` are the ids that annotations have."""
    yield from repeated(categories, "id", True)
    yield from repeated(categories, "name", False)
    groups = {
        str(category.get("supercategory"))
        for category in categories.values()
        if category.get("supercategory") != category["name"]
    }
    for i, category in categories.items():
        if used and category["id"] not in used and category["name"] in groups:
            text = f"{category['name']!r} is the group of others and has no annotation of its own"
            yield False, "unused root category", i, f"{text}, but the model gets a class for it"
    for kind, text in keypoint_warnings(categories.values()):
        yield False, kind, None, text


def _check_images(images: Entries, root: str, pictures: str) -> Iterator[Finding]:
    if len({type(image["id"]) for image in images.values()}) > 1:
        yield True, "mixed ids", None, "some images have numbers for ids, and others texts"
    yield from repeated(images, "id", True)
    yield from repeated(images, "file_name", False)
    most = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 30)
    listings: dict[str, set[str]] = {}
    looks = {}
    for i, image in images.items():
        width, height = image["width"], image["height"]
        ratio = max(width, height) / min(width, height)
        if ratio > _WIDE or width * height > most:
            is_error = ratio > _TOO_WIDE or width * height > most
            yield is_error, "extreme shape", i, f"is {width} x {height}: extreme"
        folder, name = os.path.split(path := os.path.join(root, image["file_name"]))
        if name not in _files_in(folder, listings) and not os.path.isfile(path):
            cause = _why_missing(image["file_name"], root, listings)
            yield True, MISSING_PICTURE, i, f"is not in {root}{cause}"
        elif pictures != "present":
            looks[i] = (path, width, height)
    found = picture_problems([*looks.values()], decode=pictures == "decoded")
    for i, problem in zip(looks, found):
        if problem:
            yield True, "bad picture", i, problem


def _files_in(folder: str, listings: dict[str, set[str]]) -> set[str]:
    """Each folder is listed once: far faster than to ask for each of 100,000 files."""
    if folder not in listings:
        try:
            listings[folder] = {entry.name for entry in os.scandir(folder) if entry.is_file()}
        except (OSError, ValueError):
            listings[folder] = set()
    return listings[folder]


def _why_missing(file_name: str, root: str, listings: dict[str, set[str]]) -> str:
    """The likely cause, as the end of a sentence; empty if none is known."""
    if "\\" in file_name:
        return ": its folders are parted by backslashes, which are letters here; write / for them"
    folder, name = os.path.split(os.path.join(root, file_name))
    stem, suffix = os.path.splitext(name)
    for place, near in ((root, name), (folder, name.strip()), (folder, stem + suffix.swapcase())):
        if near in _files_in(place, listings):
            return f", but {os.path.join(place, near)} is there"
    return ""
