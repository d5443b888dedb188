"""What is wrong with a dataset in COCO's format: the one place that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nl_detectron.data.coco_annotations import check_annotations
from nl_detectron.data.coco_format import REQUIRED_KEYS, Finding, Record, format_problems, repeated
from nl_detectron.data.coco_images import check_images
from nl_detectron.data.keypoints import keypoint_metadata, keypoint_warnings

# Errors for training alone, which leaves such entries out, takes them twice or cannot take them.
_UNTRAINABLE = {"negative box", "empty box", "box outside", "repeated file", "no mask"}


class Problem(NamedTuple):
    """One thing that is wrong with an entry of the file, or with the whole (``place`` is None)."""

    is_error: bool  # Detectron2 cannot live with it; otherwise it is a warning
    kind: str
    section: str  # of the file: "images", "annotations" or "categories"
    place: int | None  # its index in the section
    text: str  # one line, which names the entry


def check_coco(coco: Record, image_root: Path, pictures: str = "present") -> list[Problem]:
    """
    Find all that is wrong with a dataset, what is of a wrong kind first and then compared no more.

    ``pictures``: "present", whether the files are there; "header", also their recorded size, their
    bits and whether they end too early; "decoded", all of them. FileNotFoundError: there is no
    folder ``image_root``.
    """
    if not image_root.is_dir():
        raise FileNotFoundError(f"The image folder {image_root} does not exist")
    problems: list[Problem] = []
    sound = {}
    for section in REQUIRED_KEYS:
        entries = coco[section]
        found = list(format_problems(section, entries))
        for i, kind, text in found:
            text = f"{section}[{i}] {text}{_ids_of(entries[i])}"
            problems.append(Problem(True, kind, section, i, text))
        sound[section] = _others(entries, {i for i, _, _ in found})
    categories = sound["categories"][1]
    num_keypoints = len(keypoint_metadata(categories).get("keypoint_names", ()))
    known = {key: _ids(coco[key]) for key in ("images", "categories")}
    sizes = {image["id"]: (image["width"], image["height"]) for image in sound["images"][1]}
    used = {annotation["category_id"] for annotation in sound["annotations"][1]}
    checks = {
        "categories": _check_categories(categories, used),
        "images": check_images(sound["images"][1], str(image_root), pictures),
        "annotations": check_annotations(sound["annotations"][1], known, sizes, num_keypoints),
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
    if not coco["annotations"]:
        text = "there are no annotations: none to train on, and in evaluation no AP"
        problems.append(Problem(False, "no annotations", "annotations", None, text))
    return problems


def in_one_line(problems: Sequence[Problem]) -> str:
    """Say the first problem and, where there are more, how many there are of each kind."""
    if len(problems) == 1:
        return problems[0].text
    counts = ", ".join(f"{count} x {kind}" for kind, count in count_kinds(problems).items())
    return f"{problems[0].text}; {len(problems)} in all ({counts}): tools/check_data.py lists them"


def count_kinds(problems: Iterable[Problem]) -> Counter[str]:
    """Count problems by kind."""
    return Counter(problem.kind for problem in problems)


def without_bad(coco: Record, problems: Iterable[Problem]) -> Record:
    """
    Leave out images and annotations that have an error or are of no use in training, and the
    annotations of images that are left out. Problems of categories stay.
    """
    drop: dict[str, set[int | None]] = {section: set() for section in REQUIRED_KEYS}
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


def _others(entries: list[Any], places: set[int]) -> tuple[Sequence[int], list[Record]]:
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


def _check_categories(categories: list[Record], used: set[Any]) -> Iterator[Finding]:
    """``used`` are the ids that annotations have."""
    yield from repeated(categories, "id", True)
    yield from repeated(categories, "name", False)
    groups = {
        str(c.get("supercategory")) for c in categories if c.get("supercategory") != c["name"]
    }
    for i, category in enumerate(categories):
        if used and category["id"] not in used and category["name"] in groups:
            text = f"{category['name']!r} is the group of others and has no annotation of its own"
            yield False, "unused root category", i, f"{text}, but the model gets a class for it"
    for kind, text in keypoint_warnings(categories):
        yield False, kind, -1, text
