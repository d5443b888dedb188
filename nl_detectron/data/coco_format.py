"""Reading a file in COCO's JSON format, and whether each of its values is of the right kind."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, Any]
Entries = dict[int, Record]  # of a section of the file, by their places in it
Finding = tuple[bool, str, "int | None", str]  # is_error, kind, place (None: of the whole), text
Check = Callable[[Collection[Any]], bool]  # of many values at once: there are millions

REQUIRED_KEYS = {  # categories first: tools leave out all annotations where there is no category
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
}
MAX_PIXELS = 1_000_000  # of a coordinate; pycocotools crashes on some that are much larger
MAX_AREA = 1e10  # of an annotation; COCO's evaluation leaves out what is larger
_LARGEST = 1e300  # so that sums stay finite


@contextmanager
def no_garbage() -> Iterator[None]:
    """Keep Python from looking for garbage, in a ``with`` or a decorated function: of millions of
    new objects none is garbage, and the search takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_coco(json_file: Path) -> Record:
    """Read a file; whether its entries are sound says :func:`check_coco`. Its lists of images and
    categories are not empty; a test set's list of annotations may be.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, or has no such lists; the message names the file.
    """
    if not json_file.is_file():
        raise FileNotFoundError(f"The annotation file {json_file} does not exist")
    try:
        coco = json.loads(json_file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{json_file} is not JSON: {error}") from error
    lists = coco if isinstance(coco, dict) else {}
    if lists.keys() >= {"images", "categories"}:
        lists.setdefault("annotations", [])
    for section in REQUIRED_KEYS:
        if not isinstance(lists.get(section), list):
            keys = ", ".join(map(repr, list(lists)[:5]))
            found = f"an object with the keys {keys}" if keys else _shown(coco)
            raise ValueError(
                f"{json_file} is not in COCO's format: it has no list {section!r}, but is {found}"
            )
        if not lists[section] and section != "annotations":
            raise ValueError(f"{json_file} has no {section}: its list {section!r} is empty")
    return lists


def format_problems(section: str, entries: list[Any]) -> Iterator[tuple[int, str, str]]:
    """Find each value of a section that has a meaning in COCO's format and is of a wrong kind,
    whether or not values agree with each other: the entry's index, the kind of problem, what is
    wrong."""
    required = REQUIRED_KEYS[section]
    records = {}
    for i, entry in enumerate(entries):
        if type(entry) is dict:
            records[i] = entry
        else:
            text = f"is {_shown(entry)}, not an object with the keys {', '.join(required)}"
            yield i, "no object", text
    for key, (legal, are_legal) in _KINDS[section].items():
        values = [entry.get(key) for entry in records.values()]
        if key not in required:  # people write null for what they have not got
            values = [value for value in values if value is not None]
        if are_legal(values):
            continue
        for i, entry in records.items():
            value = entry.get(key)
            if key in required and key not in entry:
                yield i, f"no {key}", f"has no {key!r}"
            elif (value is not None or key in required) and not are_legal([value]):
                yield i, f"wrong {key}", f"has {key} {_shown(value)}, not {legal}"


def repeated(entries: Entries, key: str, is_error: bool) -> Iterator[Finding]:
    """Find all entries of which there are several; where the first one may stay, the others."""
    values = {i: entry.get(key) for i, entry in entries.items()}
    if len(set(values.values())) == len(values):
        return
    counts, seen = Counter(values.values()), set()
    for i, value in values.items():
        if value is not None and counts[value] > 1 and (is_error or value in seen):
            kind = "repeated file" if key == "file_name" else f"repeated {key}"
            yield is_error, kind, i, f"has {key} {value!r}, as have {counts[value] - 1} others"
        seen.add(value)


def rle_counts(counts: str) -> list[int]:
    """The lengths of the runs of a compressed RLE, any of which may be negative if it is broken.

    COCO's ``rleToString`` writes numbers in groups of 5 bits, from "0" on, with a sixth bit where
    the number goes on; from the fourth on each is the difference from the last but one. ValueError:
    it ends within a number, or has other letters.
    """
    lengths: list[int] = []
    value = shift = 0
    for code in counts.encode("ascii"):
        code -= 48
        if not 0 <= code < 64 or shift > 30:
            raise ValueError("not a compressed RLE")
        value |= (code & 31) << shift
        shift += 5
        if code < 32:
            if code & 16:
                value -= 1 << shift
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("not a compressed RLE: it ends within a number")
    return lengths


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _of_type(*types: type) -> Callable[[Iterable[Any]], bool]:
    return lambda values: set(types).issuperset(map(type, values))  # a bool is no integer here


def _each(is_legal: Callable[[Any], bool]) -> Check:
    return lambda values: all(map(is_legal, values))


def _in_range(lists: Collection[Collection[Any]], lowest: float, highest: float) -> bool:
    """Lists of numbers, none of them NaN. There are millions, so there is no loop here."""
    if not _of_type(int, float)(chain.from_iterable(lists)):
        return False
    try:
        numbers = np.fromiter(chain.from_iterable(lists), np.float64)
    except OverflowError:  # an integer
        return False
    return not len(numbers) or bool(numbers.min() >= lowest and numbers.max() <= highest)


def _are_sizes(values: Collection[Any]) -> bool:
    return _in_range([values], 1, MAX_PIXELS) and all(value == int(value) for value in values)


def _are_integers(values: Collection[Any]) -> bool:
    ends = min, max
    return _of_type(int)(values) and all(-(1 << 63) <= f(values, default=0) < 1 << 63 for f in ends)


def _are_ids(values: Collection[Any]) -> bool:
    """Texts may stand among them. NumPy turns larger integers into floats or objects."""
    return _are_integers([value for value in values if type(value) is not str])


def _are_coordinates(lists: Collection[Any]) -> bool:
    """Lists of them, which may be empty."""
    return _of_type(list)(lists) and _in_range(lists, -MAX_PIXELS, MAX_PIXELS)


def _are_boxes(values: Collection[Any]) -> bool:
    return _are_coordinates(values) and {4}.issuperset(map(len, values))


def _are_segmentations(values: Collection[Any]) -> bool:
    if not _of_type(list, dict)(values):
        return False
    polygons = [*chain.from_iterable(value for value in values if type(value) is list)]
    return (
        _are_coordinates(polygons)
        and all(length >= 6 and length % 2 == 0 for length in set(map(len, polygons)))
        and all(_is_rle(value) for value in values if type(value) is dict)
    )


def _is_rle(value: Record) -> bool:
    """pycocotools never returns from some RLEs whose counts do not sum up to their size."""
    size, counts = value.get("size"), value.get("counts")
    if type(size) is not list or len(size) != 2 or not _are_sizes(size):
        return False
    if type(counts) is str:
        try:
            counts = rle_counts(counts)
        except ValueError:
            return False
    if type(counts) is not list or not _of_type(int)(counts):
        return False
    return min(counts, default=0) >= 0 and sum(counts) == size[0] * size[1]


def _is_list_of_texts(value: Any) -> bool:
    return type(value) is list and _of_type(str)(value)


class _Kind(NamedTuple):
    """What the values of a key must be."""

    legal: str  # for the message
    are_legal: Check


_ID = _Kind("an integer (of 64 bits) or a text", _are_ids)
_SIZE = _Kind(f"an integer from 1 to {MAX_PIXELS}", _are_sizes)
_INTEGER = _Kind("an integer (of 64 bits)", _are_integers)
_TEXT = _Kind("a text", _of_type(str))
_NUMBER = _Kind("a number", lambda values: _in_range([values], -_LARGEST, _LARGEST))
_KINDS: dict[str, dict[str, _Kind]] = {
    "images": {"id": _ID, "file_name": _TEXT, "height": _SIZE, "width": _SIZE},
    "annotations": {
        "id": _Kind("a number or a text", _of_type(int, float, str)),  # they are numbered anew
        "image_id": _ID,
        "category_id": _INTEGER,
        "bbox": _Kind("[x, y, width, height], four finite numbers", _are_boxes),
        "segmentation": _Kind(
            "an RLE ({'size': [height, width], 'counts': ...} whose counts sum up to the size) nor "
            "a list of polygons [x1, y1, x2, y2, x3, y3, ...] of three or more points",
            _are_segmentations,
        ),
        "keypoints": _Kind("a list of numbers", _are_coordinates),
        "num_keypoints": _NUMBER,
        "iscrowd": _Kind("0 or 1", _each((0, 1).__contains__)),
        "ignore": _Kind("0: Detectron2 has no other", _each((0,).__contains__)),
        "area": _NUMBER,
    },
    "categories": {
        "id": _INTEGER,
        "name": _TEXT,
        "keypoints": _Kind("a list of names", _each(_is_list_of_texts)),
    },
}
