"""Attention as the paper draws it: a point, and arrows to the places that count for it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from nl_detectron.analysis.attention_map import AttentionMap, AttentionMaps
from nl_detectron.analysis.placement import Box, Point
from nl_detectron.layers import ATTENTION

NEARLY_EVEN = 1.1
"""No greater multiple of the mean counts for something."""

_PAGE = 8.3, 11.7  # inches: A4
_LARGEST, _SMALLEST = 4.2, 1.8  # inches, the sides of a square picture
_FONT = 7.0  # points
_CHARACTER, _LINE = 0.6 * _FONT / 72, 1.3 * _FONT / 72  # inches
_TEXT = 230  # characters, about, above and below a picture
_SCALE = 7 * _LINE  # inches for the bar of colours
_POINT_COLOR = "#56B4E9"
_OUTLINE = [patheffects.withStroke(linewidth=2.5, foreground="black")]
_LIGHT: dict[str, Any] = {"color": "white", "path_effects": _OUTLINE}
_ARROW = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0, **_LIGHT}
_OUTLINE_OF_LARGE = [patheffects.withStroke(linewidth=4.5, foreground="black")]
_LARGE_ARROW = {**_ARROW, "lw": 2, "mutation_scale": 18, "path_effects": _OUTLINE_OF_LARGE}
_NUMBER = {"textcoords": "offset points", "fontsize": _FONT + 1, "zorder": 5, **_LIGHT}


def draw_attention(maps: AttentionMaps, *, arrows: int = 5, plain: bool = False) -> Figure:
    """
    Draw a panel for each point and block: the map as colours over the image, on one scale for all
    panels that is fitted to them, and arrows from the point to the peaks of the map. For the blocks
    of a head it is the part of the image around the object's box. Points that a block does not see
    have no panel. The figure fits a page, A4, or with many panels A3 or A2, and needs no display;
    ``figure.savefig(path)`` writes it.

    Args:
        arrows: how many at most; the legend has the multiple of the mean of each.
        plain: nothing but the image, the points and the arrows, as in Figure 3 of the paper.
    """
    shown = [
        (block.name, block.pairwise, point, attention_map)
        for point, of_blocks in zip(maps.points, zip(*(block.maps for block in maps.blocks)))
        for block, attention_map in zip(maps.blocks, of_blocks)
        if attention_map is not None
    ]
    height, width = maps.image.shape[:2]
    columns, rows, picture_width, row_height = _grid(len(shown), height / width, plain)
    scale = 0 if plain else _SCALE
    figure = Figure(
        (columns * picture_width, rows * row_height + scale), layout="constrained", dpi=200
    )
    highest = fitted_scale([attention_map.multiples for *_, attention_map in shown])
    hidden = len(maps.points) * len(maps.blocks) - len(shown)
    if hidden and not plain:
        figure.supxlabel(
            f"not shown: {hidden} in no detected object's box, where a block sees nothing",
            fontsize=_FONT,
        )
    panels = []
    for position, (name, pairwise, point, attention_map) in enumerate(shown, 1):
        panel = figure.add_subplot(rows, columns, position)
        panels.append(panel)
        panel.imshow(maps.image, extent=(0, width, height, 0))
        panel.set(xticks=[], yticks=[])
        legend = _draw_arrows(panel, attention_map, point, arrows, numbered=not plain)
        _zoom(panel, attention_map.extent, (width, height))
        panel.plot(*point, "o", color=_POINT_COLOR, mec="black", ms=9 if plain else 5, zorder=4)
        if plain:
            continue
        heat = _draw_map(panel, attention_map, maps.what, highest)
        legend += describe(attention_map, pairwise, maps.what)
        if attention_map.leaves_out_a_strip((width, height)):
            legend += "\nno colour at the edge: pooling leaves out an odd row or column"
        characters = int(picture_width / _CHARACTER)
        title = "{}\npoint {:.0f}, {:.0f}".format(name, *point)
        panel.set_title(_wrapped(title, characters), fontsize=_FONT)
        panel.set_xlabel(_wrapped(legend, characters), fontsize=_FONT)
    if panels and not plain:
        _add_scale(figure, panels, heat, maps.what, highest, unit(shown[0][1], maps.what))
    return figure


def describe(attention_map: AttentionMap, pairwise: str, what: str) -> str:
    """
    What the colours do not tell: what the map shows, of a block with this kind of weights in
    :data:`nl_detectron.layers.ATTENTION`, how uneven it is, what is not shown of it.
    """
    kind = f"{pairwise} weights" if what == "weights" else what
    if what == "effect":
        kind = "effect on the object's score, amber raises it, blue lowers it"
    highest = np.abs(attention_map.multiples).max()
    evenness = "" if highest >= NEARLY_EVEN else "nearly even, "
    itself = " (the point itself)" if attention_map.is_highest_at_query else ""
    text = f"{kind}: {evenness}at most {short(highest)} times {unit(pairwise, what)}{itself}"
    if not attention_map.mean:
        text = f"{kind}: no place counts more than another"
    elif what == "weights" and ATTENTION[pairwise].is_signed:
        text += ", by magnitude: they have either sign"
    if attention_map.outside >= 0.001:
        text += f"\n{100 * attention_map.outside:.1f} % of it is in the padding, not shown"
    return text


def unit(pairwise: str, what: str) -> str:
    """What a map is drawn in multiples of."""
    has_sum = what == "weights" and ATTENTION[pairwise].weight_sum is not None
    return "an even share" if has_sum else "the mean magnitude"


def short(multiple: float) -> str:
    """A multiple of any sign with three digits."""
    return f"{float(f'{multiple:.3g}'):g}"


def fitted_scale(multiples: Sequence[np.ndarray]) -> int:
    """
    The multiple of the mean at which the scale of some maps ends (and at its inverse): the power of
    2, from 2 to 64, that all but one place in a thousand stay below, such as the point itself.
    """
    magnitudes = np.concatenate([np.abs(values).ravel() for values in multiples] or [np.ones(1)])
    return int(2 ** np.ceil(np.log2(np.quantile(magnitudes, 0.999).clip(2, 64))))


def on_scale(multiples: np.ndarray, what: str, highest: float) -> np.ndarray:
    """
    The place of multiples of the mean magnitude on the scale of :func:`heat_colors`: the logarithm
    of the magnitude, -1 at 1/highest and below, 0 at 1, 1 at highest and above; for an effect, 0 up
    to a magnitude of 1, and from there to 1 or, where it is negative, to -1.
    """
    with np.errstate(divide="ignore"):
        place = np.log(np.abs(multiples)) / np.log(highest)
    if what == "effect":
        return np.sign(multiples) * place.clip(0, 1)
    return place.clip(-1, 1)


def heat_colors(what: str) -> Colormap:
    """
    Colours from -1 to 1: magenta, which photographs hardly have, above 0, and dark below; for an
    effect amber and blue. Transparent at 0, so that the image can be seen in its own colours.
    """
    steps = np.linspace(-1, 1, 256)
    low, high = ("#060b2b", 0.4), ("#ff00c8", 0.7)
    if what == "effect":
        low, high = ("#2377e4", 0.7), ("#ffae00", 0.7)
    rgba = np.where(steps[:, None] < 0, to_rgba(*low), to_rgba(*high))
    rgba[:, 3] *= np.abs(steps) ** 0.8
    return ListedColormap(rgba)


def _grid(panels: int, aspect: float, plain: bool) -> tuple[int, int, float, float]:
    """Columns, rows, and width and height of a panel in inches: the widest that fit a page."""
    for enlarged in (1.0, 2**0.5, 2.0):
        page_width, page_height = enlarged * _PAGE[0], enlarged * _PAGE[1] - _SCALE
        widest = min(page_width, _LARGEST / aspect**0.5)
        for width in np.arange(widest, _SMALLEST / aspect**0.5, -0.05):
            columns = max(min(int(page_width / width), panels), 1)
            rows = max(math.ceil(panels / columns), 1)
            height = width * aspect
            if not plain:
                height += (_TEXT * _CHARACTER / width + 5) * _LINE
            if rows * height <= page_height:
                return columns, rows, width, height
    return columns, rows, width, height


def _draw_map(panel: Axes, attention_map: AttentionMap, what: str, highest: int) -> AxesImage:
    left, top, right, bottom = attention_map.extent
    place: dict[str, Any] = {"extent": (left, right, bottom, top), "interpolation": "nearest"}
    scale: dict[str, Any] = {"cmap": heat_colors(what), "vmin": -1, "vmax": 1}
    heat = panel.imshow(on_scale(attention_map.multiples, what, highest), **place, **scale)
    left, top, right, bottom = attention_map.query
    size = right - left, bottom - top
    panel.add_patch(Rectangle((left, top), *size, fill=False, edgecolor=_POINT_COLOR))
    return heat


def _add_scale(
    figure: Figure, panels: list[Axes], heat: AxesImage, what: str, highest: int, of_what: str
) -> None:
    bar = figure.colorbar(
        heat, ax=panels, location="bottom", extend="both", shrink=0.6, aspect=40, pad=0.02
    )
    middle = short(highest**0.5)
    low = ("-{}", "-{}", "±1") if what == "effect" else ("1/{}", "1/{}", "1")
    labels = [text.format(n) for text, n in zip(low, (highest, middle, 1))]
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=[*labels, middle, str(highest)])
    bar.ax.tick_params(labelsize=_FONT)
    bar.set_label(f"times {of_what}; the scale is fitted to this picture", fontsize=_FONT)


def _draw_arrows(
    panel: Axes, attention_map: AttentionMap, point: Point, count: int, *, numbered: bool
) -> str:
    """Draw the arrows, and return their legend."""
    legend = ""
    left, top, right, bottom = attention_map.extent
    for number, (end, value) in enumerate(attention_map.strongest(count), 1):
        multiple = value / attention_map.mean
        if abs(multiple) < NEARLY_EVEN:
            break
        panel.annotate("", end, point, arrowprops=_ARROW if numbered else _LARGE_ARROW)
        if not numbered:
            continue
        # On the side where there is room for it.
        x, y = 2 * end[0] < left + right, 2 * end[1] < top + bottom
        side: dict[str, Any] = {"ha": "left" if x else "right", "va": "top" if y else "bottom"}
        panel.annotate(str(number), end, (4 if x else -4, -4 if y else 4), **_NUMBER, **side)
        legend += f"{number}:\xa0{short(multiple)}\xa0x   "
    if not legend and count and np.abs(attention_map.multiples).max() >= NEARLY_EVEN:
        legend = "no arrow: nowhere but at the point is there a peak"
    return legend.rstrip() + "\n" if legend else ""


def _wrapped(text: str, characters: int) -> str:
    return "\n".join(textwrap.fill(line, characters) for line in text.splitlines())


def _zoom(panel: Axes, extent: Box, image_size: tuple[int, int]) -> None:
    """Show the extent and a margin, but nothing outside the image, (width, height)."""
    left, top, right, bottom = extent
    margin = 0.15 * max(right - left, bottom - top)
    width, height = image_size
    panel.set_xlim(max(left - margin, 0), min(right + margin, width))
    panel.set_ylim(min(bottom + margin, height), max(top - margin, 0))
