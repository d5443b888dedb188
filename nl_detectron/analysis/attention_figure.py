"""Attention as the paper draws it: a point, and arrows to the places it attends to."""

from __future__ import annotations

import itertools
import math

import cv2
import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from nl_detectron.analysis.attention_map import (
    AttentionMap,
    AttentionMaps,
    BlockAttention,
)
from nl_detectron.analysis.placement import Box, Point
from nl_detectron.layers import ATTENTION

_PANEL = 4.0  # inches, the longer side of the picture in a panel
_WEIGHTS_PER_LINE = 5
_POINT_COLOR = "#56B4E9"
_OUTLINE = [patheffects.withStroke(linewidth=3, foreground="black")]
_ARROW = {
    "arrowstyle": "->",
    "color": "white",
    "shrinkA": 0,
    "shrinkB": 0,
    "path_effects": _OUTLINE,
}


def draw_attention(maps: AttentionMaps, *, arrows: int = 5) -> Figure:
    """
    A panel for each point and block: the weights as a heat map over the image, and arrows from the
    point to the peaks of the map. For the blocks of a head it is the part of the image around the
    object's box. Each point has a row; with a single block they are three in a row.

    Args:
        maps: what to draw: at least one point and one block.
        arrows: how many at most; the legend has the weight of each.

    Returns:
        A figure that needs no display; ``figure.savefig(path)`` writes it.
    """
    height, width = maps.image.shape[:2]
    scale = _PANEL / max(height, width)
    panel_size = max(width * scale, 3.0) + 1.2, max(height * scale, 2.0) + 1.1
    columns = len(maps.blocks) if len(maps.blocks) > 1 else min(len(maps.points), 3)
    rows = math.ceil(len(maps.points) * len(maps.blocks) / columns)
    figure = Figure((columns * panel_size[0], rows * panel_size[1]), layout="compressed", dpi=150)
    pairs = itertools.product(range(len(maps.points)), maps.blocks)
    for position, (number, block) in enumerate(pairs, 1):
        _draw_panel(figure.add_subplot(rows, columns, position), maps, block, number, arrows)
    return figure


def _describe(attention_map: AttentionMap, pairwise: str) -> str:
    """What the colours do not tell: how uneven the weights are, and what is not shown."""
    if (total := ATTENTION[pairwise].weight_sum) is not None:
        ratio = attention_map.weights.max() * attention_map.keys / total
        meaning = f"at most {ratio:.3g} times an even share"
    elif ATTENTION[pairwise].is_signed:
        meaning = "weights of any sign and sum, arrows by magnitude"
    else:
        meaning = "weights of any sum"
    text = f"{pairwise}: {meaning}"
    if attention_map.outside >= 0.001:
        text += f"\n{100 * attention_map.outside:.1f} % of the weight is in the padding, not shown"
    return text


def heat_colors(pairwise: str) -> Colormap:
    """
    Args:
        pairwise: the kind of weights in :data:`nl_detectron.layers.ATTENTION`.

    Returns:
        Colours from the lowest to the highest weight, or, where weights have a sign, from -w to w.
        Weights of small magnitude are transparent, so that the image can be seen.
    """
    steps = np.linspace(0, 1, 256)
    rgba = colormaps["PuOr_r" if ATTENTION[pairwise].is_signed else "plasma"](steps)
    rgba[:, 3] = 0.9 * (np.abs(2 * steps - 1) if ATTENTION[pairwise].is_signed else steps) ** 0.5
    return ListedColormap(rgba)


def _draw_panel(
    panel: Axes, maps: AttentionMaps, block: BlockAttention, number: int, arrows: int
) -> None:
    """Draw what the point of this number attends to in a block."""
    point, attention_map = maps.points[number], block.maps[number]
    height, width = maps.image.shape[:2]
    gray = cv2.cvtColor(maps.image, cv2.COLOR_RGB2GRAY)
    panel.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    panel.set(xticks=[], yticks=[])
    panel.set_title("{}\npoint {:.0f}, {:.0f}".format(block.name, *point), fontsize=9)
    if attention_map is None:
        legend = "The point is in no detected object's box:\nthis block sees nothing else."
    else:
        _draw_weights(panel, attention_map, block.pairwise)
        legend = _draw_arrows(panel, attention_map, point, arrows, block.pairwise)
        legend += _describe(attention_map, block.pairwise)
        _zoom(panel, attention_map.extent, (width, height))
    panel.set_xlabel(legend, fontsize=8)
    panel.plot(*point, "o", color=_POINT_COLOR, mec="black", ms=7, zorder=4)


def _draw_weights(panel: Axes, attention_map: AttentionMap, pairwise: str) -> None:
    left, top, right, bottom = attention_map.extent
    heat = panel.imshow(
        attention_map.weights,
        cmap=heat_colors(pairwise),
        norm=CenteredNorm() if ATTENTION[pairwise].is_signed else None,
        extent=(left, right, bottom, top),
        interpolation="nearest",
    )
    in_percent = (
        PercentFormatter(xmax=1, symbol=" %") if ATTENTION[pairwise].weight_sum == 1 else None
    )
    bar = panel.figure.colorbar(heat, shrink=0.8, format=in_percent)
    bar.ax.tick_params(labelsize=8)
    left, top, right, bottom = attention_map.query
    panel.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=_POINT_COLOR)
    )


def _draw_arrows(
    panel: Axes, attention_map: AttentionMap, point: Point, count: int, pairwise: str
) -> str:
    """Draw the arrows, and return their legend: lines of text."""
    legend = ""
    for number, (end, weight) in enumerate(attention_map.strongest(count), 1):
        panel.annotate("", end, point, arrowprops=_ARROW)
        panel.annotate(
            str(number),
            end,
            xytext=(3, 3),
            textcoords="offset points",
            color="white",
            path_effects=_OUTLINE,
        )
        space = "   " if number % _WEIGHTS_PER_LINE else "\n"
        legend += f"{number}: {_format_weight(weight, pairwise)}{space}"
    return legend.rstrip() + "\n"


def _format_weight(weight: float, pairwise: str) -> str:
    """In per cent where the weights sum to 1."""
    if ATTENTION[pairwise].weight_sum != 1:
        return f"{weight:.3g}"
    return "< 0.0001 %" if 0 < weight < 1e-6 else f"{100 * weight:.3g} %"


def _zoom(panel: Axes, extent: Box, image_size: tuple[int, int]) -> None:
    """Show the extent and a margin, but nothing outside the image, (width, height)."""
    left, top, right, bottom = extent
    margin = 0.15 * max(right - left, bottom - top)
    width, height = image_size
    panel.set_xlim(max(left - margin, 0), min(right + margin, width))
    panel.set_ylim(min(bottom + margin, height), max(top - margin, 0))
