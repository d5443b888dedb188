"""Reading a file in COCO's JSON format, with every value that is read later checked first."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isnan
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Check = Callable[[Any], bool]
Kind = tuple[Check, str]  # and what is legal, for the message

REQUIRED_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
MAX_PIXELS = 1_000_000  # of a coordinate; pycocotools crashes on some that are much larger
_NUMBERS = {int, float}


def read_coco(json_file: Path) -> Record:
    """
    Args:
        json_file: the file to read.

    Returns:
        The file's content. All values that have a meaning in COCO's format are of the right kind;
        whether they agree with each other is for the caller to check.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, or not in COCO's format; the message names both the file
            and the entry.
    """
    if not json_file.is_file():
        raise FileNotFoundError(f"The annotation file {json_file} does not exist")
    try:
        coco = json.loads(json_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{json_file} is not JSON: {error}") from error
    for section, required in REQUIRED_KEYS.items():
        entries = coco.get(section) if isinstance(coco, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{json_file} is not in COCO's format: it has no list {section!r}")
        if not entries:
            raise ValueError(f"{json_file} has no {section}: its list {section!r} is empty")
        for i, entry in enumerate(entries):
            if problem := _problem(entry, required, _KINDS[section]):
                where = f"{section}[{i}]"
                raise ValueError(f"{json_file} is not in COCO's format: {where} {problem}")
    return coco


def _problem(entry: Any, required: tuple[str, ...], kinds: dict[str, Kind]) -> str | None:
    """What is wrong with one entry of a section, if anything."""
    if not isinstance(entry, dict):
        return f"is {_shown(entry)}, not an object with the keys {', '.join(required)}"
    for key in required:
        if key not in entry:
            return f"has no {key!r}"
    for key, (is_legal, legal) in kinds.items():
        value = entry.get(key)
        # People write null for what they have not got.
        if (value is not None or key in required) and not is_legal(value):
            return f"has {key} {_shown(value)}, not {legal}"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _of_type(*types: type) -> Check:
    return lambda value: type(value) in types  # a bool is no integer here


def _is_size(value: Any) -> bool:
    return type(value) in _NUMBERS and 0 < value <= MAX_PIXELS and value == int(value)


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS and value == value and abs(value) != float("inf")


def _list_of(is_legal: Check, length: int | None = None) -> Check:
    def check(value: Any) -> bool:
        right_length = isinstance(value, list) and length in (None, len(value))
        return right_length and all(map(is_legal, value))

    return check


def _are_coordinates(value: Any) -> bool:
    """A list of them; there are millions, so it has no loop of its own. A NaN shows in the sum."""
    if not isinstance(value, list) or not _NUMBERS.issuperset(map(type, value)):
        return False
    in_range = not value or (min(value) >= -MAX_PIXELS and max(value) <= MAX_PIXELS)
    return in_range and not isnan(sum(value))


def _is_box(value: Any) -> bool:
    return _are_coordinates(value) and len(value) == 4


def _is_polygon(value: Any) -> bool:
    return _are_coordinates(value) and len(value) >= 6 and len(value) % 2 == 0


def _is_rle(value: dict[str, Any]) -> bool:
    size: Any = value.get("size")
    counts: Any = value.get("counts")
    if not _list_of(_is_size, length=2)(size):
        return False
    if isinstance(counts, str):
        # Groups of 5 bits, from "0" on, and a sixth bit where the number goes on.
        codes = [ord(letter) - 48 for letter in counts]
        return bool(codes) and all(0 <= code < 64 for code in codes) and codes[-1] < 32
    are_lengths = _list_of(lambda count: type(count) is int and count >= 0)
    return are_lengths(counts) and sum(counts) == size[0] * size[1]


def _is_segmentation(value: Any) -> bool:
    return _is_rle(value) if isinstance(value, dict) else _list_of(_is_polygon)(value)


_KINDS: dict[str, dict[str, Kind]] = {
    "images": {
        "id": (_of_type(int, str), "an integer or a text"),
        "file_name": (_of_type(str), "a text"),
        "height": (_is_size, f"an integer from 1 to {MAX_PIXELS}"),
        "width": (_is_size, f"an integer from 1 to {MAX_PIXELS}"),
    },
    "annotations": {
        "id": (_of_type(int, str), "an integer or a text"),
        "image_id": (_of_type(int, str), "an integer or a text"),
        "category_id": (_of_type(int), "an integer"),
        "bbox": (_is_box, "[x, y, width, height]"),
        "segmentation": (
            _is_segmentation,
            "an RLE ({'size': [height, width], 'counts': ...}) nor a list of polygons "
            "[x1, y1, x2, y2, x3, y3, ...] of three or more points",
        ),
        "keypoints": (_are_coordinates, "a list of numbers"),
        "num_keypoints": (_is_number, "a number"),
        "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
        "area": (_is_number, "a number"),
    },
    "categories": {
        "id": (_of_type(int), "an integer"),
        "name": (_of_type(str), "a text"),
        "keypoints": (_list_of(_of_type(str)), "a list of names"),
        "skeleton": (_list_of(_list_of(_of_type(int), length=2)), "a list of pairs of integers"),
    },
}
