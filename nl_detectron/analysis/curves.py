"""Figures of training runs: losses, APs and the weights of non-local blocks during training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from nl_detectron.analysis.metrics import TASKS, metrics_file, read_metrics

Curve = tuple[np.ndarray, np.ndarray]
"""Iterations (T,), ascending, and the values (T,) of a metric at them."""

SMOOTHED_PART = 0.04
# Okabe and Ito's colours, which can be told apart with any colour vision, and a grey; without their
# yellow, which is too light for lines, and their second blue.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#999999")
_STYLES: list[dict[str, Any]] = [
    {"linestyle": line, "color": color} for line in ("-", "--") for color in COLORS
]
_COLUMNS = 4
_LOG_FROM = 5  # the ratio of the largest to the smallest loss from which its axis is logarithmic


def plot_metrics(runs: Mapping[str, Path]) -> Figure:
    """
    Draw the losses and APs of one or several runs, and ||W_z|| and the mean of |gamma| of their
    non-local blocks, a panel for each that any of them has. Thin lines are the losses as they were
    written, thick ones their mean over 4 % of the run. The AP of a single evaluation is a level
    line.

    Args:
        runs: label to a folder with ``metrics.json``, or to such a file.

    Raises:
        FileNotFoundError: a run has no such file.
        ValueError: there is no run, or one has a broken file, or neither losses nor APs; the
            message names the file.
    """
    if not runs:
        raise ValueError("there is no run to draw")
    curves = {label: read_curves(path) for label, path in runs.items()}
    names = sorted({name for run in curves.values() for name in run}, key=_order)
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.6), dpi=120, layout="constrained")
    for index, name in enumerate(names):
        panel = figure.add_subplot(rows, columns, index + 1)
        panel.set_title(_title(name), fontsize=10)
        for style, run in zip(itertools.cycle(_STYLES), curves.values()):
            if name in run:
                _draw_metric(panel, name, run[name], style)
        _set_axes(panel, name)
    lines = [Line2D([], [], **style) for style, _ in zip(itertools.cycle(_STYLES), runs)]
    figure.legend(lines, list(runs), loc="outside upper left", ncols=columns, frameon=False)
    return figure


def read_curves(path: Path) -> dict[str, Curve]:
    """
    Name to curve of the losses, the APs and the weights of blocks in ``metrics.json``, or of the
    folder that it lies in. Of an iteration that a resumed run has written again, the last values
    count. Values that are not finite are left out. It raises as :func:`plot_metrics`.
    """
    values: dict[str, dict[int, float]] = {}
    for record in read_metrics(path):
        for name, value in record.items():
            is_drawn = "loss" in name or _is_ap(name) or _is_weight(name)
            if is_drawn and math.isfinite(value):
                values.setdefault(name, {})[record["iteration"]] = value
    if not values:
        raise ValueError(f"{metrics_file(path)} has neither losses nor APs")
    return {name: _sorted(by_iteration) for name, by_iteration in values.items()}


def _is_ap(name: str) -> bool:
    return name.endswith("/AP")


def _is_weight(name: str) -> bool:
    return name.startswith("nonlocal/")


def _order(name: str) -> tuple[bool, bool, bool, str]:
    return _is_weight(name), _is_ap(name), name != "total_loss", name


def _title(name: str) -> str:
    if _is_ap(name):
        return f"{TASKS.get(name.split('/')[0], name.split('/')[0])} AP"
    if not _is_weight(name):
        return name
    _, block, weight = name.split("/")
    symbols = {"out_weight_norm": r"$\Vert W_z\Vert$", "mean_abs_gamma": r"mean $|\gamma|$"}
    return f"{symbols.get(weight, weight)}, {'.'.join(block.split('.')[-2:])}"


def _sorted(by_iteration: dict[int, float]) -> Curve:
    points = sorted(by_iteration.items())
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _draw_metric(panel: Axes, name: str, curve: Curve, style: dict[str, Any]) -> None:
    iterations, values = curve
    if _is_ap(name):
        label = f"{values[-1]:.1f}"
        if len(values) == 1:
            panel.axhline(values[0], **style, linewidth=1.2, label=label)
            return
        panel.plot(*curve, **style, linewidth=1.2, marker="o", markersize=4, label=label)
        return
    if not _is_weight(name):
        panel.plot(*curve, **style, linewidth=0.5, alpha=0.25, zorder=1)
        values = _smooth(values)
    panel.plot(iterations, values, **style, linewidth=1.6)


def _smooth(values: np.ndarray) -> np.ndarray:
    window = np.ones(max(1, round(SMOOTHED_PART * len(values))))
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


def _set_axes(panel: Axes, name: str) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8, which="both")
    panel.set_xlabel("iteration", fontsize=8)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    if _is_ap(name):
        panel.set_ylabel("AP, %", fontsize=8)
        panel.legend(title="last", fontsize=8, title_fontsize=8)
        if not np.isfinite(panel.dataLim.intervalx).all():  # level lines only
            panel.set(xticks=[], xlabel="")
        return
    if _is_weight(name):
        panel.ticklabel_format(axis="y", useOffset=False)
        return
    panel.set_ylabel("loss", fontsize=8)
    low, high = panel.dataLim.intervaly
    if 0 < _LOG_FROM * low < high:
        panel.set_yscale("log")
        panel.set_ylabel("loss, logarithmic", fontsize=8)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
