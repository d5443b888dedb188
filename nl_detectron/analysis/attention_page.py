"""A page that shows what counts for the point under the pointer."""

from __future__ import annotations

import base64
import html
import json
import zlib
from os import PathLike
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from nl_detectron.analysis.attention import AttentionRecord
from nl_detectron.analysis.attention_figure import (
    NEARLY_EVEN,
    fitted_scale,
    heat_colors,
    on_scale,
    unit,
)
from nl_detectron.analysis.contribution import ON_GRID
from nl_detectron.analysis.placement import PlacedFeatures

_TEMPLATE = Path(__file__).with_name("attention_page.html")
_MAX_VALUES = 6_000_000  # in a page, a byte each before compression
_MAX_PIXELS = 1280  # of the picture's longer side


def write_attention_page(
    path: str | PathLike[str], record: AttentionRecord, *, title: str = "Attention"
) -> None:
    """
    Write a self-contained HTML page: choosers of the block and of weights or contributions, the
    image, and over it these of the point under the pointer (or finger, or moved by the arrow keys),
    on a scale that is fitted to each block. The page loads
    nothing. It has at most 6 million numbers, so about 8 MB: where a block has more, not each of
    its cells can be asked but, say, every third in either direction, and the page says so.

    Args:
        path: a file; it is replaced if there is one.
        record: from :func:`record_attention`.
        title: the page's heading, such as the image's name.
    """
    height, width = record.image.shape[:2]
    left, top, right, bottom = record.boxes[0] if len(record.boxes) else (0, 0, width, height)
    share = _MAX_VALUES // (len(ON_GRID) * len(record.blocks))
    palette = (heat_colors("weights")(np.arange(256)) * 255).round().astype(np.uint8)
    data = {
        "width": width,
        "height": height,
        "image": data_url(record.image),
        "start": [(left + right) / 2, (top + bottom) / 2],
        "nearlyEven": NEARLY_EVEN,
        "colors": _base64(palette.tobytes()),
        "kinds": {
            what: [_block(record, name, what, share) for name in record.blocks] for what in ON_GRID
        },
    }
    # A "<" could end the script element that the JSON stands in.
    json_text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{data}}", json_text).replace("{{title}}", html.escape(title))
    Path(path).write_text(page, encoding="utf-8")


def _block(record: AttentionRecord, name: str, what: str, max_values: int) -> dict[str, Any]:
    """
    What the page needs of a block. ``values`` are those of all regions, of their queries and of
    their keys, in this order, a byte each: 0 is the scale's lower end, 255 its upper one.
    """
    pairwise = record.blocks[name].pairwise
    regions: list[dict[str, Any]] = []
    multiples: list[np.ndarray] = []
    for features in sorted(record.features[name], key=lambda features: features.area):
        share = max_values // len(record.features[name])
        region, values = _region(record, name, features, what, share)
        regions.append({**region, "offset": sum(values.size for values in multiples)})
        multiples.append(values)
    highest = fitted_scale(multiples)
    places = [(on_scale(values, what, highest) + 1) / 2 * 255 for values in multiples]
    content = b"".join(place.round().astype(np.uint8).tobytes() for place in places)
    step = max((region["step"] for region in regions), default=1)
    return {
        "name": name,
        "note": f"{name}: {pairwise}."
        + (f" Of its cells one in {step} x {step} can be asked." if step > 1 else ""),
        "unit": unit(pairwise, what),
        "scale": highest,
        "values": _base64(zlib.compress(content)),
        "regions": regions,
    }


def _region(
    record: AttentionRecord, name: str, features: PlacedFeatures, what: str, max_values: int
) -> tuple[dict[str, Any], np.ndarray]:
    """The place of some features in the image, and what counts for their cells, in multiples."""
    height, width = record.image.shape[:2]
    rows, columns = features.rows.visible(height), features.columns.visible(width)
    (sample,) = record.ask(name, features, [(rows[0], columns[0])])
    step = 1
    while len(rows[::step]) * len(columns[::step]) * sample.values.size > max_values:
        step += 1
    cells = [(i, j) for i in _thinned(rows, step) for j in _thinned(columns, step)]
    maps = record.ask(name, features, cells, what)
    multiples = np.stack([attention_map.multiples for attention_map in maps])
    (top, bottom), (left, right) = features.rows.span(rows), features.columns.span(columns)
    return {
        "box": [left, top, right, bottom],
        "rows": len(rows),
        "columns": len(columns),
        "step": step,
        "keys": {
            "box": sample.extent,
            "rows": sample.values.shape[0],
            "columns": sample.values.shape[1],
        },
        "highest": _short(np.abs(multiples).max((1, 2)) * [m.mean > 0 for m in maps]),
        "outside": _short(np.array([attention_map.outside for attention_map in maps])),
    }, multiples


def _thinned(cells: np.ndarray, step: int) -> np.ndarray:
    """The middle one of every ``step`` cells; where fewer are left, the last at most."""
    return cells[np.minimum(np.arange(step // 2, len(cells) + step // 2, step), len(cells) - 1)]


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(image: np.ndarray, max_pixels: int = _MAX_PIXELS) -> str:
    """
    A picture (H, W, 3), uint8, RGB, as the URL of a JPEG that it holds itself, for a page that
    loads nothing; made smaller if its longer side has more than ``max_pixels``.
    """
    scale = min(1, max_pixels / max(image.shape))
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", small[:, :, ::-1])
    return f"data:image/jpeg;base64,{_base64(jpeg.tobytes())}"
