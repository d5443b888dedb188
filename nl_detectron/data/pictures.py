"""Picture files: whether Detectron2 can read them, and reads what is in them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from PIL import Image

_EXIF_ORIENTATION = 274  # a tag of EXIF; from 5 on height and width change places
_LAST_BYTES = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# More threads than cores where files come over a network; only decoding makes full use of a core.
_READERS, _AT_ONCE = 8, 256

Look = tuple[str, float | None, float | None]  # a file, and its recorded width and height


class UnreadableImageError(OSError):
    """A picture cannot be read, or not as it was recorded; the message is one line."""


def picture_problems(looks: Sequence[Look], *, decode: bool) -> Iterator[str | None]:
    """What :func:`picture_problem` says of each, in order; files are read in threads."""
    some = [looks[i : i + _AT_ONCE] for i in range(0, len(looks), _AT_ONCE)]
    threads = os.cpu_count() if decode else _READERS
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # of palettes, broken EXIF data and the like
        for texts in pool.map(
            lambda some: [picture_problem(*x, decode=decode) for x in some], some
        ):
            yield from texts


def picture_problem(
    path: str, width: float | None, height: float | None, *, decode: bool
) -> str | None:
    """What is wrong with a picture for Detectron2, which turns it as its EXIF data say and reads 8
    bits a value: one line without a subject, such as "is empty (0 bytes)", or None.

    Without ``decode`` the header is read, and all of it only where it does not end as its format's
    files do. Recorded sizes may be None.
    """
    try:
        if not os.path.getsize(path):
            return "is empty (0 bytes)"
        with open(path, "rb") as file, Image.open(file) as image:
            mode, size = image.mode, image.size
            # EXIF data may stand at the end of a PNG file, which is decoded to look for them.
            in_header = image.format != "PNG" or "exif" in image.info
            turn = _orientation(image) if in_header else 1
            if decode or not _ends_well(file, image.format or ""):
                # Not by Detectron2's read_image: of some broken PNG files it returns a part.
                image.convert("RGB")
                turn = turn if in_header else _orientation(image)
            # Pillow turns a TIFF file itself, and Detectron2 then turns it again.
            if turn != 1 and image.format == "TIFF":
                return (
                    f"is a TIFF file with orientation {turn}, which is applied twice: save it "
                    "turned, without the tag"
                )
    except Exception as error:  # PIL's decoders raise anything
        if not os.path.isfile(path):
            return "is not there"
        return f"does not decode: {' '.join(str(error).split()) or type(error).__name__}"
    size = size[::-1] if turn > 4 else size
    if None not in (width, height) and size != (width, height):
        return f"is {size[0]} x {size[1]} (EXIF rotation included), recorded as {width} x {height}"
    if mode.startswith(("I", "F")):
        return f"has more than 8 bits a value (PIL's mode {mode}): what is above 255 becomes 255"
    return None


def _orientation(image: Image.Image) -> int:
    """From 1, as it is, to 8."""
    try:
        turn = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # of broken EXIF data; Detectron2 passes over them, too
        return 1
    return turn if turn in range(1, 9) else 1


def _ends_well(file: IO[bytes], format_: str) -> bool:
    ending = _LAST_BYTES.get(format_)
    if ending is None:
        return True
    place = file.tell()
    file.seek(-len(ending), os.SEEK_END)
    is_there = file.read(len(ending)) == ending
    file.seek(place)
    return is_there
