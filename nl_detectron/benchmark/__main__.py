"""``python -m nl_detectron.benchmark``: time, memory and accuracy of the non-local operation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from nl_detectron.benchmark import accuracy, report, scaling
from nl_detectron.benchmark.arguments import parse_arguments
from nl_detectron.benchmark.cases import IMAGE_SIZE, QUICK_IMAGE_SIZE, Case
from nl_detectron.benchmark.child import ChildError, run_in_child
from nl_detectron.benchmark.comparison import compare
from nl_detectron.benchmark.contestants import OURS
from nl_detectron.benchmark.measure import DIFFERS, MEASURED
from nl_detectron.benchmark.plots import plot_comparison, plot_scaling

# For how many seconds the implementations take turns, for each level and pass of a case.
_BUDGET, _QUICK_BUDGET = 1.0, 0.02


class _Report(NamedTuple):
    text: str
    records: list[dict[str, Any]]
    is_sound: bool
    plot: Callable[[Path], None] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Args:
        arguments: the words of the command line; those of this process by default.

    Returns:
        The exit status: 1 if results differ, or if something of ours could not be measured.
    """
    args = parse_arguments(arguments)
    modes = {"comparison": _comparison, "scaling": _scaling, "accuracy": _accuracy}
    machine = report.describe_machine(args.device, args.threads)
    print(report.machine_line(machine), file=sys.stderr)
    result = modes[args.mode](args)
    print(result.text)
    if args.json:
        content = {"machine": machine, args.mode: result.records}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.plot and result.plot:
        result.plot(args.plot)
    return 0 if result.is_sound else 1


def _comparison(args: argparse.Namespace) -> _Report:
    image_size = QUICK_IMAGE_SIZE if args.quick else IMAGE_SIZE
    cases = [
        Case(stage, pairwise, subsample, args.batch, image_size)
        for stage in args.stages
        for subsample in args.subsample
        for pairwise in args.pairwise
    ]
    calls = {str(case): (compare, case, args.device, _budget(args)) for case in cases}
    results, is_complete = _run_all(calls, args)
    rows = [row for rows in results for row in rows]
    is_sound = is_complete and all(
        row.outcome.status == MEASURED
        or (row.implementation != OURS and row.outcome.status != DIFFERS)
        for row in rows
    )
    return _Report(
        report.comparison_tables(rows, _style(args)),
        [row.as_dict() for row in rows],
        is_sound,
        partial(plot_comparison, rows),
    )


def _scaling(args: argparse.Namespace) -> _Report:
    sizes = scaling.QUICK_POSITIONS if args.quick else scaling.POSITIONS
    calls = {
        f"{pairwise}, N = {n:,}": (scaling.measure_at, pairwise, n, args.device, _budget(args))
        for pairwise in args.pairwise
        for n in scaling.positions_for(pairwise, sizes)
    }
    results, is_complete = _run_all(calls, args)
    points = [point for points in results for point in points]
    growths = scaling.fit_growth(points)
    return _Report(
        report.scaling_table(points, growths, _style(args)),
        [point.as_dict() for point in points],
        is_complete and all(point.outcome.status != DIFFERS for point in points),
        partial(plot_scaling, points, growths),
    )


def _accuracy(args: argparse.Namespace) -> _Report:
    sizes = accuracy.QUICK_POSITIONS if args.quick else accuracy.POSITIONS
    calls = {
        f"{name}, N = {n:,}, mean {mean:g}": (
            accuracy.measure_accuracy,
            name,
            n,
            mean,
            args.device,
        )
        for name in accuracy.OPERATIONS
        for n in sizes
        for mean in accuracy.MEANS
    }
    accuracies, is_complete = _run_all(calls, args)
    text = report.accuracy_table(accuracies, _style(args))
    return _Report(text, [asdict(a) for a in accuracies], is_complete)


def _run_all(
    calls: Mapping[str, tuple[Any, ...]], args: argparse.Namespace
) -> tuple[list[Any], bool]:
    """
    What each function (the first of each value) returns for its arguments (the others), and
    whether all did return. If none did, the process ends.
    """
    results = []
    progress = tqdm(calls.items(), unit="case")
    for name, (function, *arguments) in progress:
        progress.set_description(name)
        try:
            result = run_in_child(
                function,
                *arguments,
                device=args.device,
                threads=args.threads,
                memory_limit=args.memory_limit,
            )
        except ChildError as error:
            progress.write(f"{name}: {error}", file=sys.stderr)
        else:
            results.append(result)
    if not results:
        sys.exit("nothing could be measured")
    return results, len(results) == len(calls)


def _budget(args: argparse.Namespace) -> float:
    return _QUICK_BUDGET if args.quick else _BUDGET


def _style(args: argparse.Namespace) -> str:
    return "github" if args.markdown else "simple"


if __name__ == "__main__":
    sys.exit(main())
