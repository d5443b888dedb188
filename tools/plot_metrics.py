#!/usr/bin/env python3
"""Draw what metrics.json has of one or several training runs: losses, APs, weights of the blocks.

    python tools/plot_metrics.py output/quick_start --output curves.png
    python tools/plot_metrics.py output/baseline output/nl --labels "R50" "R50 + NL" \\
        --output curves.pdf

Thin lines are the losses as they were written, which are medians of 20 iterations each; thick lines
are their mean over 4 % of the run. APs are points, with the last one in figures. Of each non-local
block there are ||W_z|| and the mean of |gamma|.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from nl_detectron.analysis.curves import plot_metrics
from nl_detectron.engine.command_line import Parser, exit_on_user_error
from nl_detectron.files import check_target, run_name


@exit_on_user_error()
def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    sources = [run / "metrics.json" if run.is_dir() else run for run in args.runs]
    check_target("--output", args.output, sources, overwrite=args.overwrite)
    plot_metrics(label_runs(args.runs, args.labels)).savefig(args.output)
    print(args.output)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    where = "metrics.json, or the folder it lies in"
    add("runs", type=Path, nargs="+", metavar="RUN", help=where)
    names = "one for each run (default: folder names)"
    add("--labels", nargs="+", metavar="LABEL", help=names)
    add("--output", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg")
    parser.add_overwrite()
    return parser


def label_runs(runs: list[Path], labels: list[str] | None) -> dict[str, Path]:
    """ValueError: there are not as many labels as runs, or two runs have the same."""
    if labels is None:
        labels = [run_name(run.parent if run.is_file() else run) for run in runs]
    if len(labels) != len(runs):
        raise ValueError(f"--labels are {len(labels)}, but the runs are {len(runs)}")
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} runs have the label {label!r}: tell them apart with --labels")
    return dict(zip(labels, runs))


if __name__ == "__main__":
    main()
