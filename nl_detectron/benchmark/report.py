"""Tables and JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from matplotlib.ticker import EngFormatter
from tabulate import tabulate

from nl_detectron.benchmark.accuracy import CHANNELS, QUANTITIES, Accuracy
from nl_detectron.benchmark.cases import Case
from nl_detectron.benchmark.comparison import BLOCK, OPERATION, PASSES_OF, Row
from nl_detectron.benchmark.contestants import OURS
from nl_detectron.benchmark.measure import (
    DIFFERS,
    FORWARD,
    FORWARD_BACKWARD,
    MEASURED,
    OUT_OF_MEMORY,
    UNAVAILABLE,
    Outcome,
)
from nl_detectron.benchmark.scaling import FITTED_POINTS, Growth, Point

_PACKAGES = ("nl_detectron", "torch", "mmcv-lite", "mmcv", "pytorchvideo", "timm")
_TITLES = {
    BLOCK: "The whole block: 1x1 convolutions, operation, batch norm (in evaluation mode), sum",
    OPERATION: "The operation alone: y from given theta, phi and g",
}
_NOTES = """\
{batch} image(s) of {image_size}, float32; positions x channels: {positions}.
fwd is inference; bwd gives the gradients of the inputs and, in the block, of the weights.
Times are medians of runs in turns; memory is the peak beyond inputs and weights.
In brackets: how many times what {ours} takes.
All that was measured gave the same results and gradients of the inputs: max |difference| /
max |result| is at most {difference:.1e}."""

_SECONDS = EngFormatter("s", places=1)
_BYTES = EngFormatter("B", places=1)


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures depend on: device, cores, threads, versions of packages, date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": str(device),
        "name": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The same in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['name']} ({machine['device']}), {machine['cores']} cores, "
        f"{machine['threads']} threads, {versions}, {machine['date'][:10]}"
    )


def comparison_tables(rows: Sequence[Row], style: str) -> str:
    """A table for the block and one for the operation; ``style`` is one of tabulate's."""
    tables = [f"{_TITLES[level]}\n\n{_level_table(rows, level, style)}" for level in PASSES_OF]
    cases = {row.case.stage: row.case for row in rows}.values()
    differences = [row.outcome.difference or 0 for row in rows if row.outcome.status == MEASURED]
    notes = _NOTES.format(
        batch=rows[0].case.batch,
        image_size="{} x {}".format(*rows[0].case.image_size),
        positions=", ".join(f"{c.stage} {c.grid[0] * c.grid[1]:,} x {c.channels}" for c in cases),
        ours=OURS,
        difference=max(differences, default=0),
    )
    reasons = dict.fromkeys(r.outcome.note for r in rows if r.outcome.status == UNAVAILABLE)
    left_out = "\n".join(f"Left out as {reason}" for reason in reasons)
    return "\n\n".join([*tables, notes, left_out]).rstrip()


def _level_table(rows: Sequence[Row], level: str, style: str) -> str:
    outcomes: dict[tuple[Case, str], list[Outcome]] = {}
    for row in rows:
        if row.level == level and row.outcome.status != UNAVAILABLE:
            outcomes.setdefault((row.case, row.implementation), []).append(row.outcome)
    lines = []
    for (case, name), passes in outcomes.items():
        ours = outcomes[case, OURS]
        lines.append(
            [case.stage, case.pairwise, case.subsample, name]
            + [_time(outcome, our) for outcome, our in zip(passes, ours)]
            + [_memory(outcome, our) for outcome, our in zip(passes, ours)]
            + [shorten(passes[-1].note, 60)]
        )
    short = [{FORWARD: "fwd", FORWARD_BACKWARD: "fwd + bwd"}[p] for p in PASSES_OF[level]]
    headers = ["stage", "pairwise function", "subsample", "implementation"]
    headers += [f"{quantity}, {which}" for quantity in ("time", "memory") for which in short]
    return tabulate(lines, [*headers, "note"], tablefmt=style)


def scaling_table(points: Sequence[Point], growths: Sequence[Growth], style: str) -> str:
    """Time and memory at every N, and a line with the fitted exponents of each series."""
    lines = [
        [p.pairwise, p.implementation, f"{p.positions:,}", _time(p.outcome), _memory(p.outcome)]
        for p in points
    ]
    headers = ["pairwise function", "implementation", "N", "time", "memory"]
    exponents = [
        [g.pairwise, g.implementation, _exponent(g.time_exponent), _exponent(g.memory_exponent)]
        for g in growths
    ]
    return (
        f"{tabulate(lines, headers, tablefmt=style, colalign=_align(2, 3))}\n\n"
        "Cost ~ N^p, forward + backward of the operation alone, 128 channels, float32; p fitted to "
        f"the largest {FITTED_POINTS} N\n(N log N has p = 1.08 from 32k to 256k):\n\n"
        + tabulate(exponents, [*headers[:2], "p of time", "p of memory"], tablefmt=style)
    )


def accuracy_table(accuracies: Sequence[Accuracy], style: str) -> str:
    """The errors of y and of the gradients in float32 against float64."""
    lines = [
        [a.function, f"{a.positions:,}", f"{a.mean:g}", *(f"{e:.1e}" for e in a.errors.values())]
        for a in accuracies
    ]
    headers = ["function", "N", "mean of the inputs", *QUANTITIES]
    largest = max(error for a in accuracies for error in a.errors.values())
    return (
        f"{tabulate(lines, headers, tablefmt=style, disable_numparse=True, colalign=_align(1, 6))}"
        f"\n\nmax |error| / max |reference| of float32 against the equation in float64, {CHANNELS} "
        f"channels.\nThe largest: {largest:.1e}"
    )


def _time(outcome: Outcome, ours: Outcome | None = None) -> str:
    if outcome.seconds is None:
        if outcome.status == DIFFERS:
            return f"differs by {outcome.difference:.1e}"
        return outcome.status
    return _SECONDS(outcome.seconds) + _times(outcome, ours, "seconds")


def _memory(outcome: Outcome, ours: Outcome | None = None) -> str:
    if outcome.status == OUT_OF_MEMORY and outcome.asked_bytes is not None:
        return f"asked for {_BYTES(outcome.asked_bytes)}"
    if outcome.memory_bytes is None:
        return "-"
    return _BYTES(outcome.memory_bytes) + _times(outcome, ours, "memory_bytes")


def _times(outcome: Outcome, ours: Outcome | None, quantity: str) -> str:
    """How many times ours it is, in brackets."""
    our = ours and getattr(ours, quantity)
    if not our or outcome is ours:
        return ""
    ratio = getattr(outcome, quantity) / our
    return f" ({ratio:,.0f}x)" if ratio >= 100 else f" ({ratio:.3g}x)"


def _exponent(exponent: float | None) -> str:
    return "-" if exponent is None else f"{exponent:.2f}"


def _align(texts: int, numbers: int) -> list[str]:
    return ["left"] * texts + ["right"] * numbers


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
