"""The report of a study: a table and a figure for each group of settings."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from lab.study.plan import TrainingRun
from lab.study.runner import read_result
from nl_detectron.analysis.curves import COLORS, read_curves
from nl_detectron.analysis.metrics import TASKS

Paper = Mapping[str, Mapping[str, float]]
"""Setting to what a paper reports for it: metric to value."""

SEED_NOISE = 0.3
"""The AP of trainings on COCO that differ in their seed alone spreads by about so much."""

_NOISE = (
    f"Seed noise: on COCO, trainings that differ in their seed alone spread by about {SEED_NOISE} "
    "AP. With that as the standard deviation of each of our n runs and of the paper's one run, a "
    f"difference of up to 2 · {SEED_NOISE} · √(1 + 1/n) AP can be chance; it is in the last column."
)

METRICS = [f"{task}/{ap}" for task in TASKS for ap in ("AP", "AP50")]
CURVE = "bbox/AP"
_STYLES = ("-", "--", ":", "-.")


def write_report(
    groups: Mapping[str, Sequence[str]],
    runs: Sequence[TrainingRun],
    output: Path,
    title: str,
    paper: Paper | None = None,
    compare: Mapping[str, str] | None = None,
) -> Path:
    """Write ``report.md`` and its figures, from the runs that are finished; returns the file.
    ``compare`` has the "metric" and the setting, "to", of the comparison that counts."""
    finished: dict[str, list[TrainingRun]] = {run.setting: [] for run in runs}
    for run in runs:
        if read_result(run) is not None:
            finished[run.setting].append(run)
    count = sum(map(len, finished.values()))
    is_compared = False
    parts = [f"# {title}", f"{count} of {len(runs)} runs are finished.{_time(finished)}"]
    for number, (group, names) in enumerate(groups.items(), start=1):
        shown = {name: finished[name] for name in names if finished[name]}
        parts.append(f"## {group}")
        if not shown:
            parts.append("No run of this group is finished.")
            continue
        figure = f"group_{number}.png"
        draw_group(shown).savefig(output / figure)
        parts += [group_table(shown, paper), f"![{group}]({figure})"]
        if table := paper_table(shown, paper or {}):
            parts.append(f"Ours beside the paper's:\n\n{table}")
            is_compared = True
    if is_compared:
        parts.append(_NOISE)
    table = difference_table(finished, **compare) if compare else ""
    if compare and table:
        what = (
            f"{_header(compare['metric'])} less that of `{compare['to']}`, with Welch's interval:"
        )
        parts.append(f"## The comparison that counts\n\n{what}\n\n{table}")
    report = output / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def group_table(runs: dict[str, list[TrainingRun]], paper: Paper | None = None) -> str:
    """In Markdown, of each AP the mean and the sample standard deviation over the n seeds; then
    what the paper reports in metrics that are not ours."""
    reported = {name: (paper or {}).get(name, {}) for name in runs}
    others = [m for m in dict.fromkeys(itertools.chain(*reported.values())) if not is_ap(m)]
    values = {name: _values(group) for name, group in runs.items()}
    metrics = [m for m in METRICS if any(m in of_setting for of_setting in values.values())]
    rows = [
        [
            f"`{name}`",
            *(mean_and_deviation(values[name].get(m, [])) for m in metrics),
            len(group),
            *(reported[name].get(metric, "") for metric in others),
        ]
        for name, group in runs.items()
    ]
    headers = ["setting", *map(_header, metrics), "n", *(f"paper: {metric}" for metric in others)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def paper_table(runs: dict[str, list[TrainingRun]], paper: Paper) -> str:
    """In Markdown, of each AP that the paper reports for a setting: our mean, the paper's, ours
    minus that, and how large a difference can be chance; empty if it reports none."""
    rows = []
    for name, group in runs.items():
        values = _values(group)
        for metric, theirs in paper.get(name, {}).items():
            if ours := values.get(metric) if is_ap(metric) else None:
                difference = mean_and_deviation([value - theirs for value in ours], sign="+")
                mean = f"{np.mean(ours):.1f}"
                row = [f"`{name}`", _header(metric), mean, f"{theirs:.1f}", difference, len(ours)]
                noise = f"±{seed_noise(len(ours)):.1f}" if metric.endswith("/AP") else ""
                rows.append([*row, noise])
    headers = ["setting", "", "ours", "paper", "ours - paper", "n", "seed noise"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) if rows else ""


def difference_table(runs: Mapping[str, Sequence[TrainingRun]], metric: str, to: str) -> str:
    """In Markdown, the means of all settings less that of one, with Welch's 95 % intervals where
    both have two runs; empty as long as there is nothing to compare."""
    values = {name: _values(group).get(metric, []) for name, group in runs.items()}
    others = [name for name in values if name != to and values[name]]
    rows = [
        [
            f"`{name}`",
            f"{np.mean(values[name]) - np.mean(values[to]):+.2f}",
            welch_interval(values[name], values[to]),
            f"{len(values[name])}, {len(values[to])}",
        ]
        for name in (others if values.get(to) else ())
    ]
    headers = ["setting", "difference", "95 % interval", "n"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) if rows else ""


def welch_interval(values: Sequence[float], others: Sequence[float]) -> str:
    """Of the difference of two means, such as "-1.20 to +0.80"; empty for a single run of one."""
    if min(len(values), len(others)) < 2:
        return ""
    try:
        stats = importlib.import_module("scipy.stats")
    except ImportError:
        return "needs scipy"
    interval = stats.ttest_ind(values, others, equal_var=False).confidence_interval()
    return f"{interval.low:+.2f} to {interval.high:+.2f}"


def seed_noise(seeds: int) -> float:
    """Two standard deviations of the mean of so many runs less a paper's one run."""
    return 2 * SEED_NOISE * float(np.sqrt(1 + 1 / seeds))


def draw_group(runs: dict[str, list[TrainingRun]]) -> Figure:
    """A panel for each task with a dot for each run, and one for the box AP during training."""
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
        task = TASKS[metric.split("/")[0]]
        panel.set_title(f"{task} AP: a dot for each seed", fontsize=10)
        panel.set_xlabel(f"{task} AP, %", fontsize=8)
        panel.set_yticks(range(len(runs)), list(runs) if panel is dot_panels[0] else [])
    for number, (name, color) in enumerate(zip(runs, colors)):
        style = _STYLES[number // len(COLORS) % len(_STYLES)]
        _draw_curve(curve_panel, runs[name], name, color, style)
    curve_panel.set_title("box AP in training", fontsize=10)
    curve_panel.set_xlabel("iteration", fontsize=8)
    curve_panel.set_ylabel("box AP, %", fontsize=8)
    if curve_panel.lines:
        curve_panel.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for panel in (*dot_panels, curve_panel):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
    return figure


def _values(runs: Sequence[TrainingRun]) -> dict[str, list[float]]:
    """Metric to its values in the runs."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for metric, value in (read_result(run) or {}).items():
            values.setdefault(metric, []).append(value)
    return values


def is_ap(metric: str) -> bool:
    """Whether Detectron2's evaluation on COCO gives a metric such as "bbox/AP75"."""
    return metric.split("/")[0] in TASKS


def _header(metric: str) -> str:
    task, ap = metric.split("/")
    return f"{TASKS[task]} {ap}"


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation such as "80.2 ± 2.2"; of a single value that alone."""
    if not values:
        return ""
    mean = f"{np.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def _time(finished: dict[str, list[TrainingRun]]) -> str:
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


def _draw_curve(
    panel: Axes, runs: Sequence[TrainingRun], label: str, color: str, style: str
) -> None:
    curves = [c[CURVE] for c in (read_curves(run.folder) for run in runs) if CURVE in c]
    if not curves:  # the AP of models that predict nothing is NaN
        return
    # A resumed run may have been evaluated at other iterations, too.
    iterations = np.unique(np.concatenate([x for x, _ in curves]))
    aps = np.stack([np.interp(iterations, x, y) for x, y in curves])
    panel.plot(iterations, aps.mean(0), style, color=color, label=label, marker=".")
    panel.fill_between(iterations, aps.min(0), aps.max(0), color=color, alpha=0.15, linewidth=0)
    panel.set_xlim(left=0)
    panel.set_ylim(0, 100)
