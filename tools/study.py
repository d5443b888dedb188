#!/usr/bin/env python3
"""Train and evaluate several settings with several seeds, side by side, and compare them.

    $ tools/study.py studies/quick.yaml
    $ tools/study.py studies/long_range.yaml --workers 2
    $ tools/study.py studies/long_range.yaml --report-only    # of what is finished so far

The plan names a config of train_net.py, the seeds, the settings (each a name and its overrides of
the config), and which settings to compare. Each run is a train_net.py of its own, on a GPU of its
own or, where there is none, on one core. After an interruption the same command goes on: finished
runs are kept, others go on from their last checkpoint, or start again.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from nl_detectron.engine.command_line import Parser, exit_on_user_error, positive_int
from nl_detectron.files import sole_user
from nl_detectron.study.plan import load_plan
from nl_detectron.study.report import write_report
from nl_detectron.study.runner import default_workers, prepare_runs, run_all

TRAIN = [sys.executable, str(Path(__file__).resolve().parent.parent / "train_net.py")]


@exit_on_user_error()
def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a run failed."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    output = args.output or Path("output", "studies", args.plan.stem)
    failed = []
    try:
        plan = load_plan(args.plan)
        runs = plan.runs(output)
        todo = prepare_runs(runs)
        print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished; in {output}")
        if todo and not args.report_only:
            with sole_user(output, "study"):
                failed = run_all(todo, TRAIN, args.workers)
        report = write_report(plan.groups, runs, output, title=f"Study {args.plan.stem}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        parser.exit(130, f"{parser.prog}: stopped; the same command goes on\n")
    print(f"\n{report.read_text(encoding='utf-8')}\n{report}")
    if failed:
        print(f"{len(failed)} runs failed: {'; '.join(map(str, failed))}", file=sys.stderr)
    return int(bool(failed))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("plan", type=Path, metavar="STUDY.yaml", help="what to compare")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: output/studies/ and the plan's name"
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        default=default_workers(),
        help="runs at a time (default: one for each GPU, or core where there is none; here "
        "%(default)s)",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="only write the report of what is finished"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
