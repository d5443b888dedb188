"""Train and evaluate several settings with several seeds, side by side, and compare them.

    $ tools/study.py lab/studies/quick.yaml
    $ tools/study.py lab/studies/long_range.yaml --workers 2
    $ tools/study.py lab/studies/long_range.yaml --report-only    # of what is finished so far
    $ tools/study.py lab/studies/coco.yaml --launcher slurm --gpus-per-run 8 --slurm partition=gpu
    $ tools/study.py lab/studies/coco.yaml --status               # what waits, runs, failed

The plan names a config of train_net.py, the seeds, the settings (each a name and its overrides of
the config), which settings to compare and, if they are not the config's, the data. Each run is a
train_net.py of its own, on a GPU of its own or, where there is none, on one core; or a job of
SLURM. After an interruption the same command goes on: finished runs are kept, running ones are left
alone, others go on from their last checkpoint, or start again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.study.inputs import check_inputs
from lab.study.plan import StudyPlan, TrainingRun, load_plan
from lab.study.runner import TRAIN, default_workers, prepare_runs, run_all
from lab.study.slurm import read_parameters, submit
from lab.study.status import read_states, state_table
from lab.study.study_report import write_report
from nl_detectron.engine.command_line import Parser, exit_on_user_error, positive_int
from nl_detectron.files import sole_user

LAB = Path(__file__).resolve().parent.parent


@exit_on_user_error()
def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a run failed."""
    parser = make_parser()
    args = parser.parse_with_overrides(arguments)
    if not args.plan.exists() and (LAB / args.plan).exists():  # where the plans have moved to
        args.plan = LAB / args.plan
    output = args.output or Path("output", "studies", args.plan.stem)
    failed: list[TrainingRun] = []
    try:
        plan = chosen_plan(args)
        runs = plan.runs(output, args.opts)
        if args.status:
            print(state_table(read_states(runs)))
            return 0
        todo = prepare_runs(runs)
        print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished; in {output}")
        if todo and not args.report_only:
            with sole_user(output, "study"):
                failed = start(todo, output, args)
        title = f"Study {args.plan.stem}"
        report = write_report(plan.groups, runs, output, title, plan.paper, plan.compare)
    except (KeyboardInterrupt, asyncio.CancelledError):
        parser.exit(130, f"{parser.prog}: stopped; the same command goes on\n")
    print(f"\n{report.read_text(encoding='utf-8')}\n{report}")
    if failed:
        print(f"{len(failed)} runs failed: {'; '.join(map(str, failed))}", file=sys.stderr)
    return int(bool(failed))


def chosen_plan(args: argparse.Namespace) -> StudyPlan:
    """The plan, or the part of it that the command line names."""
    settings = args.settings.split(",") if args.settings else None
    try:
        seeds = [int(word) for word in args.seeds.split(",")] if args.seeds else None
    except ValueError:
        raise ValueError(f"--seeds is {args.seeds!r}, not integers such as 1,2") from None
    return load_plan(args.plan).part(settings, seeds)


def start(runs: list[TrainingRun], output: Path, args: argparse.Namespace) -> list[TrainingRun]:
    """Run, or submit, those that are not waiting for SLURM or running already; which failed."""
    busy = {state.run.folder for state in read_states(runs) if state.is_busy}
    todo = [run for run in runs if run.folder not in busy]
    if busy:
        print(f"{len(busy)} runs are waiting or running already, and are left alone")
    check_inputs(todo)
    train = train_command(args.gpus_per_run, args.project)
    if args.launcher == "local":
        workers = args.workers or default_workers(args.gpus_per_run)
        return run_all(todo, train, workers, args.gpus_per_run)
    cluster = args.launcher.removeprefix("submitit-")
    parameters = read_parameters(args.slurm)
    failed = submit(todo, train, output / "jobs", args.gpus_per_run, parameters, cluster)
    print(state_table(read_states(runs)))
    return failed


def train_command(processes: int, projects: Sequence[str] = ()) -> list[str]:
    """train_net.py, in one process or in many, with the modules that it imports first."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = [f"--project={project}" for project in projects]
    return [TRAIN[0], *(launcher if processes > 1 else []), *TRAIN[1:], *options]


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("plan", type=Path, metavar="STUDY.yaml", help="what to compare")
    where = "default: output/studies/ and the plan's name"
    add("--output", type=Path, metavar="DIR", help=where)
    add("--settings", metavar="NAME,...", help="only these of the plan")
    add("--seeds", metavar="N,...", help="in the place of the plan's")
    launchers = ("local", "slurm", "submitit-local")
    where = (
        "where the runs are: on this machine (default); each in a job of SLURM; or, to try that "
        "out, in such jobs on this machine, all at once"
    )
    add("--launcher", choices=launchers, default="local", help=where)
    gpus = "train each run with torchrun on N GPUs (or N processes where there is none)"
    add("--gpus-per-run", type=positive_int, metavar="N", default=1, help=gpus)
    words = "a parameter of the jobs, such as partition=gpu or time=2880 (minutes); any number"
    add("--slurm", action="append", metavar="KEY=VALUE", default=[], help=words)
    workers = (
        "runs at a time on this machine (default: as many as it has GPUs for, or cores where there "
        f"is none; here {default_workers()})"
    )
    add("--workers", type=positive_int, metavar="N", help=workers)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--report-only", action="store_true", help="only write the report of what is finished")
    add("--status", action="store_true", help="only show the state of each run")
    parser.add_overrides("They apply to all settings, such as for a trial at a small scale.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
