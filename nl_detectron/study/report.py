"""The report of a study: a table and a figure for each group of settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from nl_detectron.analysis.curves import COLORS, read_curves
from nl_detectron.analysis.metrics import TASKS
from nl_detectron.study.plan import Run
from nl_detectron.study.runner import read_result

METRICS = [f"{task}/{ap}" for task in TASKS for ap in ("AP", "AP50")]
CURVE = "bbox/AP"
_STYLES = ("-", "--", ":", "-.")


def write_report(
    groups: Mapping[str, Sequence[str]], runs: Sequence[Run], output: Path, title: str
) -> Path:
    """
    Write ``report.md`` and its figures into the study's folder, from the runs that are finished.

    Args:
        groups: the plan's.
        runs: all of the plan's.
        output: the study's folder.
        title: the headline.

    Returns:
        The path of ``report.md``.
    """
    finished: dict[str, list[Run]] = {run.setting: [] for run in runs}
    for run in runs:
        if read_result(run) is not None:
            finished[run.setting].append(run)
    count = sum(map(len, finished.values()))
    parts = [f"# {title}", f"{count} of {len(runs)} runs are finished.{_time(finished)}"]
    for number, (group, names) in enumerate(groups.items(), start=1):
        shown = {name: finished[name] for name in names if finished[name]}
        parts.append(f"## {group}")
        if not shown:
            parts.append("No run of this group is finished.")
            continue
        figure = f"group_{number}.png"
        draw_group(shown).savefig(output / figure)
        parts += [group_table(shown), f"![{group}]({figure})"]
    report = output / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def group_table(runs: dict[str, list[Run]]) -> str:
    """
    Args:
        runs: setting to its finished runs, one or more.

    Returns:
        A Markdown table: of each AP the mean and the sample standard deviation over the seeds, and
        their number n.
    """
    values = {name: _values(group) for name, group in runs.items()}
    metrics = [m for m in METRICS if any(m in of_setting for of_setting in values.values())]
    rows = [
        [f"`{name}`", *(mean_and_deviation(values[name].get(m, [])) for m in metrics), len(group)]
        for name, group in runs.items()
    ]
    headers = ["setting", *(f"{TASKS[m.split('/')[0]]} {m.split('/')[1]}" for m in metrics), "n"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw_group(runs: dict[str, list[Run]]) -> Figure:
    """
    Args:
        runs: setting to its finished runs, one or more.

    Returns:
        For each task a panel with a dot for each run and a line at their mean; then the box AP
        during training, the mean over the seeds in a band from the lowest to the highest.
    """
    values = {name: _values(group) for name, group in runs.items()}
    metrics = [f"{t}/AP" for t in TASKS if any(f"{t}/AP" in v for v in values.values())]
    colors = list(itertools.islice(itertools.cycle(COLORS), len(runs)))
    figure = Figure(
        figsize=(2.6 * len(metrics) + 5.4, max(2.8, 1.4 + 0.3 * len(runs))),
        dpi=120,
        layout="constrained",
    )
    widths = [1] * len(metrics) + [1.6]
    *dot_panels, curve_panel = figure.subplots(1, len(widths), width_ratios=widths)
    for panel, metric in zip(dot_panels, metrics):
        _draw_dots(panel, [values[name].get(metric, []) for name in runs], colors)
        panel.set_title(f"{TASKS[metric.split('/')[0]]} AP, by seed", fontsize=10)
        panel.set_yticks(range(len(runs)), list(runs) if panel is dot_panels[0] else [])
    for number, (name, color) in enumerate(zip(runs, colors)):
        style = _STYLES[number // len(COLORS) % len(_STYLES)]
        _draw_curve(curve_panel, runs[name], name, color, style)
    curve_panel.set_title("box AP in training", fontsize=10)
    curve_panel.set_xlabel("iteration", fontsize=8)
    curve_panel.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for panel in (*dot_panels, curve_panel):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
    return figure


def _values(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Metric to its values in the runs."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for metric, value in (read_result(run) or {}).items():
            values.setdefault(metric, []).append(value)
    return values


def mean_and_deviation(values: Sequence[float]) -> str:
    """
    Args:
        values: of one metric, over the seeds.

    Returns:
        Mean and sample standard deviation such as "80.2 ± 2.2"; of a single value the value alone,
        of none the empty string.
    """
    if not values:
        return ""
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def _time(finished: dict[str, list[Run]]) -> str:
    seconds = [s for group in finished.values() for s in _values(group).get("seconds", [])]
    if not seconds:
        return ""
    return f" A run took {np.mean(seconds):.0f} s on average, {sum(seconds) / 60:.0f} min in sum."


def _draw_dots(panel: Axes, values: Sequence[Sequence[float]], colors: Sequence[str]) -> None:
    for row, (of_setting, color) in enumerate(zip(values, colors)):
        panel.plot(of_setting, [row] * len(of_setting), "o", color=color, alpha=0.7, markersize=5)
        if of_setting:
            panel.plot([np.mean(of_setting)] * 2, [row - 0.3, row + 0.3], color=color)
    panel.set_xlim(0, 100)
    panel.set_ylim(len(values) - 0.5, -0.5)


def _draw_curve(panel: Axes, runs: Sequence[Run], label: str, color: str, style: str) -> None:
    curves = [read_curves(run.folder)[CURVE] for run in runs]
    # A resumed run may have been evaluated at other iterations, too.
    iterations = np.unique(np.concatenate([x for x, _ in curves]))
    aps = np.stack([np.interp(iterations, x, y) for x, y in curves])
    panel.plot(iterations, aps.mean(0), style, color=color, label=label, marker=".")
    panel.fill_between(iterations, aps.min(0), aps.max(0), color=color, alpha=0.15, linewidth=0)
    panel.set_xlim(left=0)
    panel.set_ylim(0, 100)
