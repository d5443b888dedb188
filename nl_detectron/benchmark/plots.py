"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from nl_detectron.benchmark.cases import Case
from nl_detectron.benchmark.comparison import BLOCK, OPERATION, Row
from nl_detectron.benchmark.contestants import CONTESTANTS, OURS
from nl_detectron.benchmark.measure import (
    FAILED,
    FORWARD_BACKWARD,
    MEASURED,
    OUT_OF_MEMORY,
    Outcome,
)
from nl_detectron.benchmark.scaling import Growth, Point

# Okabe and Ito's colours, which the colour-blind can tell apart, and a shape each.
_STYLES = dict(
    zip(
        CONTESTANTS,
        [("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v")],
    )
)
_SERIES = {
    "dot_product": ("#0072B2", "o"),
    "concatenation": ("#D55E00", "s"),
    "embedded_gaussian": ("#009E73", "^"),
    "gaussian": ("#CC79A7", "D"),
}
# The quantity's name, its attribute of Outcome and of Growth, its unit.
_QUANTITIES = (
    ("time", "seconds", "time_exponent", "s"),
    ("extra memory", "memory_bytes", "memory_exponent", "B"),
)


def plot_comparison(rows: Sequence[Row], file: Path) -> None:
    """
    How many times our time and memory the others take, forward + backward, for every case a dot
    each on a logarithmic scale: the whole block above, the operation alone below.
    """
    rows = [row for row in rows if row.which == FORWARD_BACKWARD]
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure((12, 2.4 + 0.6 * len(cases)), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True, squeeze=False)
    for panel_row, level in zip(panels, (BLOCK, OPERATION)):
        outcomes = {(r.case, r.implementation): r.outcome for r in rows if r.level == level}
        for axes, (quantity, attribute, _, _) in zip(panel_row, _QUANTITIES):
            title = "whole block" if level == BLOCK else "operation alone"
            axes.set_title(f"{title}: {quantity}", loc="left")
            _draw_ratios(axes, cases, outcomes, attribute)
    others = {name: style for name, style in _STYLES.items() if name != OURS}
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=name)
        for name, (color, marker) in others.items()
    ]
    handles.append(Line2D([], [], color="black", label=f"{OURS} = 1"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(file, dpi=150)


def plot_scaling(points: Sequence[Point], growths: Sequence[Growth], file: Path) -> None:
    """Time and memory over N, both on logarithmic scales; the legends have the exponents."""
    figure = Figure((12, 6), layout="constrained")
    for axes, (quantity, attribute, exponent, unit) in zip(figure.subplots(1, 2), _QUANTITIES):
        for growth in growths:
            series = [
                point
                for point in points
                if (point.pairwise, point.implementation)
                == (growth.pairwise, growth.implementation)
                and point.outcome.status == MEASURED
            ]
            color, marker = _SERIES[growth.pairwise]
            power = getattr(growth, exponent)
            label = f"{growth.pairwise}, {growth.implementation}"
            axes.loglog(
                [point.positions for point in series],
                [getattr(point.outcome, attribute) for point in series],
                color=color,
                marker=marker,
                linestyle="-" if growth.implementation == OURS else ":",
                label=label if power is None else f"{label}: $N^{{{power:.2f}}}$",
            )
        axes.set_title(f"{quantity}, forward + backward", loc="left")
        axes.set_xlabel("positions N")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _binary(n)))
        axes.yaxis.set_major_formatter(EngFormatter(unit))
        axes.grid(color="0.9")
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)


def _draw_ratios(
    axes: Axes,
    cases: Sequence[Case],
    outcomes: Mapping[tuple[Case, str], Outcome],
    attribute: str,
) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color="black")
    for y, case in enumerate(cases):
        ours = getattr(outcomes.get((case, OURS)), attribute, None)
        for shift, (name, (color, marker)) in enumerate(_STYLES.items()):
            outcome = outcomes.get((case, name))
            height = y + 0.2 * (shift - 2.5)  # ours, the first of five, is the line
            if name == OURS or outcome is None:
                continue
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
            if outcome.status in (OUT_OF_MEMORY, FAILED):
                transform = axes.get_yaxis_transform()
                axes.plot(1.04, height, transform=transform, clip_on=False, **style)
            elif outcome.status == MEASURED and ours:
                axes.plot(getattr(outcome, attribute) / ours, height, **style)
    axes.text(
        1.04, 1, "out of memory\nor error", transform=axes.transAxes, ha="center", va="bottom"
    )
    axes.set_yticks(range(len(cases)), [_label(case) for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("times ours, forward + backward")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    for y in range(0, len(cases), 2):
        axes.axhspan(y - 0.5, y + 0.5, color="0.96", zorder=0)


def _label(case: Case) -> str:
    pooled = {"none": "", "embeddings": ", pooled", "input": ", pooled input"}[case.subsample]
    return f"{case.stage} {case.pairwise.replace('_', ' ')}{pooled}"


def _binary(n: float) -> str:
    return f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"
