"""What was measured, as text and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from lab.benchmarks.comparison import BLOCK, OPERATION, PASSES, MeasuredPass
from lab.benchmarks.implementations import NAMES, OURS, Case
from lab.benchmarks.measure import (
    DIFFERS,
    FORWARD,
    FORWARD_BACKWARD,
    MEASURED,
    UNAVAILABLE,
    Outcome,
)
from nl_detectron.analysis.curves import COLORS

_TITLES = {
    BLOCK: "The whole block: 1x1 convolutions, operation, batch norm (in evaluation mode), sum",
    OPERATION: "The operation alone: y from given theta, phi and g",
}
_SHORT = {FORWARD: "fwd", FORWARD_BACKWARD: "fwd + bwd"}
_NOTES = f"""\
{{batch}} image(s), float32. fwd is inference; bwd gives the gradients of the inputs and, in the
block, of the weights. Times are medians of runs in turns; memory is the peak beyond inputs and
weights. In brackets: how many times what {OURS} takes. All that was measured gave the same
results and gradients of the inputs: max |difference| / max |result| <= {{difference:.1e}}."""
# With fewer, all time goes into calling functions and into the convolutions.
_TELLING_POSITIONS = 1000
# At small N the cost is that of calling functions, not of computing.
_FITTED_POINTS = 4
# A colour and a shape for each implementation.
_STYLES = tuple(zip(COLORS, "os^DvPX"))
# The attributes of Outcome that are compared, their names and how they are written.
_QUANTITIES = {
    "seconds": ("time", EngFormatter("s", places=1)),
    "memory_bytes": ("memory", EngFormatter("B", places=1)),
}


def tables(rows: Sequence[MeasuredPass], style: str, *, growth: bool) -> str:
    """Tables in one of tabulate's styles, and notes; with ``growth`` the p of cost ~ N^p."""
    from tabulate import tabulate  # the plots do without

    levels = [level for level in PASSES if any(row.level == level for row in rows)]
    parts = [f"{_TITLES[level]}\n\n{_table(rows, level, style)}" for level in levels]
    if growth:
        lines = [
            [
                *key,
                *("-" if (p := _exponent(points, q)) is None else f"{p:.2f}" for q in _QUANTITIES),
            ]
            for key, points in _series(rows).items()
        ]
        headers = ["pairwise function", "implementation", "p of time", "p of memory"]
        parts.append(
            f"Cost ~ N^p; p fitted to the largest {_FITTED_POINTS} N (N log N has p = 1.08 from "
            f"32k to 256k):\n\n{tabulate(lines, headers, tablefmt=style)}"
        )
    difference = max(r.outcome.difference or 0 for r in rows if r.outcome.status != DIFFERS)
    parts.append(_NOTES.format(batch=rows[0].case.batch, difference=difference))
    if (most := max(row.case.positions for row in rows)) < _TELLING_POSITIONS:
        parts.append(f"N = {most} is too small to tell: only large inputs show the differences.")
    reasons = dict.fromkeys(r.outcome.note for r in rows if r.outcome.status == UNAVAILABLE)
    parts.append("\n".join(f"Left out: {reason}" for reason in reasons))
    return "\n\n".join(parts).rstrip()


def _table(rows: Sequence[MeasuredPass], level: str, style: str) -> str:
    from tabulate import tabulate

    outcomes: dict[tuple[Case, str], list[Outcome]] = {}
    for row in rows:
        if row.level == level and row.outcome.status != UNAVAILABLE:
            outcomes.setdefault((row.case, row.implementation), []).append(row.outcome)
    lines = [
        [case.stage, f"{case.positions:,}", case.pairwise, case.subsample, name]
        + [_cell(o, ours, q) for q in _QUANTITIES for o, ours in zip(passes, outcomes[case, OURS])]
        + [shorten(passes[-1].note, 60)]
        for (case, name), passes in outcomes.items()
    ]
    headers = ["stage", "N", "pairwise function", "subsample", "implementation"]
    headers += [f"{q}, {_SHORT[w]}" for q, _ in _QUANTITIES.values() for w in PASSES[level]]
    return tabulate(lines, [*headers, "note"], tablefmt=style, disable_numparse=True)


def _cell(outcome: Outcome, ours: Outcome, quantity: str) -> str:
    """The quantity, and in brackets how many times ours it is; or why there is none."""
    value, our = getattr(outcome, quantity), getattr(ours, quantity)
    form = _QUANTITIES[quantity][1]
    if value is not None and (outcome is ours or not our):
        return form(value)
    if value is not None:
        ratio = f"{value / our:,.0f}" if value >= 100 * our else f"{value / our:.3g}"
        return f"{form(value)} ({ratio}x)"
    if quantity == "memory_bytes":
        return "-" if outcome.asked_bytes is None else f"asks for {form(outcome.asked_bytes)}"
    return f"differs by {outcome.difference:.1e}" if outcome.status == DIFFERS else outcome.status


def _series(rows: Iterable[MeasuredPass]) -> dict[tuple[str, str], list[MeasuredPass]]:
    """What was measured of each pairwise function and implementation."""
    series: dict[tuple[str, str], list[MeasuredPass]] = {}
    for row in rows:
        points = series.setdefault((row.case.pairwise, row.implementation), [])
        if row.outcome.status == MEASURED:
            points.append(row)
    return series


def _exponent(rows: Iterable[MeasuredPass], quantity: str) -> float | None:
    """The slope of log cost over log N at the largest N; None where there are too few points."""
    points = sorted((r.case.positions, getattr(r.outcome, quantity)) for r in rows)
    if len(points) < 2:
        return None
    log_n, log_cost = np.log(np.array(points[-_FITTED_POINTS:], dtype=float)).T
    return float(np.polyfit(log_n, log_cost, 1)[0])


def plot_growth(rows: Sequence[MeasuredPass], file: Path) -> None:
    """Time and memory over N, both on logarithmic scales; the legends have the exponents."""
    figure = Figure((12, 6), layout="constrained")
    functions = list(dict.fromkeys(row.case.pairwise for row in rows))
    for axes, (quantity, (title, form)) in zip(figure.subplots(1, 2), _QUANTITIES.items()):
        for (function, name), points in _series(rows).items():
            color, marker = _STYLES[1 + functions.index(function)]
            power = _exponent(points, quantity)
            axes.loglog(
                [row.case.positions for row in points],
                [getattr(row.outcome, quantity) for row in points],
                marker + ("-" if name == OURS else ":"),
                color=color,
                label=f"{function}, {name}" + ("" if power is None else f": $N^{{{power:.2f}}}$"),
            )
        axes.set(title=f"{title}, forward + backward", xlabel="positions N")
        axes.set_xscale("log", base=2)
        binary = FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}")
        axes.xaxis.set_major_formatter(binary)
        axes.yaxis.set_major_formatter(form)
        axes.grid(color="0.9")
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)


def plot_ratios(rows: Sequence[MeasuredPass], file: Path) -> None:
    """
    How many times our time and memory the others take, forward + backward, for every case a dot
    each on a logarithmic scale: the whole block above, the operation alone below.
    """
    rows = [row for row in rows if row.which == FORWARD_BACKWARD]
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure((12, 2.4 + 0.6 * len(cases)), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True, squeeze=False)
    for panel_row, level in zip(panels, PASSES):
        for axes, (quantity, (title, _)) in zip(panel_row, _QUANTITIES.items()):
            axes.set_title(f"{_TITLES[level].partition(':')[0]}: {title}", loc="left")
            _draw_ratios(axes, cases, [row for row in rows if row.level == level], quantity)
    handles = [axes.plot([], [], m, color=c)[0] for c, m in _STYLES[1 : len(NAMES)]]
    handles.append(axes.axvline(1, color="black"))
    labels = [*NAMES[1:], f"{OURS} = 1"]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(file, dpi=150)


def _draw_ratios(axes: Axes, cases: list[Case], rows: list[MeasuredPass], quantity: str) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color="black")
    ours = {row.case: getattr(row.outcome, quantity) for row in rows if row.implementation == OURS}
    for case, name, _, _, outcome in rows:
        index = NAMES.index(name)
        color, marker = _STYLES[index]
        y = cases.index(case) + 0.8 * (index / len(NAMES) - 0.5)
        value, our = getattr(outcome, quantity), ours[case]
        if value and our and name != OURS:
            axes.plot(value / our, y, marker, color=color, markersize=5)
        elif outcome.status not in (UNAVAILABLE, MEASURED):
            (mark,) = axes.plot(1.04, y, marker, color=color, markersize=5, clip_on=False)
            mark.set_transform(axes.get_yaxis_transform())
    beside = "out of memory\nor error"
    axes.text(1.04, 1, beside, transform=axes.transAxes, ha="center", va="bottom")
    pooled = {"none": "", "embeddings": ", pooled", "input": ", pooled input"}
    pooled["pyramid"] = ", pyramid"
    labels = [
        f"{c.stage} {c.pairwise.replace('_', ' ')}{pooled[c.subsample]}"
        + (f", {c.precision}" if c.precision != "fp32" else "")
        for c in cases
    ]
    axes.set_yticks(range(len(cases)), labels)
    low, high = axes.get_xlim()
    axes.set(xlim=(min(low, 0.5), max(high, 2)), ylim=(len(cases) - 0.5, -0.5))
    axes.set_xlabel("times ours, forward + backward")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    for y in range(0, len(cases), 2):
        axes.axhspan(y - 0.5, y + 0.5, color="0.96", zorder=0)
