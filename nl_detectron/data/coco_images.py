"""What is wrong with the images of a dataset in COCO's format, and with their pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator

from PIL import Image

from nl_detectron.data.coco_format import Finding, Record, repeated
from nl_detectron.data.pictures import picture_problems

MISSING_PICTURE = "missing picture"
_WIDE, _TOO_WIDE = 20, 1000  # longer : shorter side; beyond the second, resizing leaves no pixel

_Listings = dict[str, set[str]]  # of each folder, the names of its files


def check_images(images: list[Record], root: str, pictures: str) -> Iterator[Finding]:
    """Find what is wrong; ``pictures`` as for :func:`check_coco`."""
    if len({type(image["id"]) for image in images}) > 1:
        yield True, "mixed ids", -1, "some images have numbers for ids, and others texts"
    yield from repeated(images, "id", True)
    yield from repeated(images, "file_name", False)
    most = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 30)
    listings: _Listings = {}
    places, looks = [], []
    for i, image in enumerate(images):
        width, height = image["width"], image["height"]
        if max(width, height) > _WIDE * min(width, height) or width * height > most:
            is_error = max(width, height) > _TOO_WIDE * min(width, height) or width * height > most
            yield is_error, "extreme shape", i, f"is {width} x {height}: extreme"
        path = os.path.join(root, image["file_name"])
        if not _is_file(path, listings):
            cause = _why_missing(image["file_name"], root, listings)
            yield True, MISSING_PICTURE, i, f"is not in {root}{cause}"
        elif pictures != "present":
            places.append(i)
            looks.append((path, width, height))
    for i, text in zip(places, picture_problems(looks, decode=pictures == "decoded")):
        if text:
            yield True, "bad picture", i, text


def _is_file(path: str, listings: _Listings) -> bool:
    """``os.path.isfile``, but each folder is listed once: far faster for 100,000 files of it."""
    folder, name = os.path.split(path)
    return name in _files_in(folder, listings) or os.path.isfile(path)


def _files_in(folder: str, listings: _Listings) -> set[str]:
    if folder not in listings:
        try:
            listings[folder] = {entry.name for entry in os.scandir(folder) if entry.is_file()}
        except (OSError, ValueError):
            listings[folder] = set()
    return listings[folder]


def _why_missing(file_name: str, root: str, listings: _Listings) -> str:
    """The likely cause, as the end of a sentence; empty if none is known."""
    if "\\" in file_name:
        return ": its folders are parted by backslashes, which are letters here; write / for them"
    folder, name = os.path.split(os.path.join(root, file_name))
    stem, suffix = os.path.splitext(name)
    for place, near in ((root, name), (folder, name.strip()), (folder, stem + suffix.swapcase())):
        if near in _files_in(place, listings):
            return f", but {os.path.join(place, near)} is there"
    return ""
