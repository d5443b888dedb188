"""Picture files: whether Detectron2 can read them, and reads what is in them."""

from __future__ import annotations

import contextlib
import os

from PIL import Image

_EXIF_ORIENTATION = 274  # a tag of EXIF; from 5 on height and width change places
_LAST_BYTES = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class UnreadableImageError(OSError):
    """A picture cannot be read, or not as it was recorded; the message is one line."""


def picture_problem(
    path: str, width: float | None, height: float | None, *, decode: bool
) -> str | None:
    """
    Args:
        path: the file.
        width: the recorded width, in pixels; None if none is.
        height: the recorded height.
        decode: read all of it. Otherwise the header is read, and all of it only where the file
            does not end as files of its format do.

    Returns:
        What is wrong with it for Detectron2, which turns pictures as their EXIF data say and reads
        8 bits a value; None for nothing.
    """
    if not os.path.isfile(path):
        return "is not there"
    if not os.path.getsize(path):
        return "is empty (0 bytes)"
    try:
        with Image.open(path) as image:
            mode, size = image.mode, image.size
            if decode or not _ends_well(path, image.format or ""):
                # Not by Detectron2's read_image: of some broken PNG files it returns a part.
                image.convert("RGB")
                decode = True
            # EXIF data may stand at the end of a PNG file, which is decoded to look for them.
            if decode or image.format != "PNG" or "exif" in image.info:
                size = size[::-1] if _is_turned(image) else size
    except Exception as error:  # PIL's decoders raise anything
        return f"does not decode: {' '.join(str(error).split()) or type(error).__name__}"
    if None not in (width, height) and size != (width, height):
        return f"is {size[0]} x {size[1]} (EXIF rotation included), recorded as {width} x {height}"
    if mode.startswith(("I", "F")):
        return f"has more than 8 bits a value (PIL's mode {mode}): what is above 255 becomes 255"
    return None


def _is_turned(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # of broken EXIF data; Detectron2 passes over them, too
        return bool(image.getexif().get(_EXIF_ORIENTATION, 1) > 4)
    return False


def _ends_well(path: str, format_: str) -> bool:
    ending = _LAST_BYTES.get(format_)
    if ending is None:
        return True
    with open(path, "rb") as file:
        file.seek(-len(ending), os.SEEK_END)
        return file.read() == ending
