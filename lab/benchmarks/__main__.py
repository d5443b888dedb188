"""``python -m lab.benchmarks``: time and memory of the non-local operation beside others."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tqdm import tqdm

from lab.benchmarks.benchmark_report import plot_growth, plot_ratios, tables
from lab.benchmarks.comparison import (
    OPERATION,
    PASSES,
    MeasuredPass,
    available_memory,
    compare,
    run_limited,
)
from lab.benchmarks.implementations import FUNCTIONS, NAMES, OURS, STAGES, SUBSAMPLE, TEXTBOOK, Case
from lab.benchmarks.machine import describe_machine, machine_line
from lab.benchmarks.measure import DIFFERS, MEASURED, is_out_of_memory
from nl_detectron.engine.command_line import Parser, exit_on_user_error, positive_int
from nl_detectron.files import check_target

HELP = """
Time and peak memory of the non-local block (forward, forward + backward) and of the operation alone
(forward + backward) on one 800 x 1344 image, side by side with the N x N form as one writes it from
the equation, and with mmcv, PyTorchVideo, timm and mmsegmentation, where they are installed and
compute the same. So are its successors: --pairwise disentangled and global_context, --subsample
pyramid.
All have the same weights and inputs. Results and gradients are compared before anything is timed;
if they differ, the exit status is 1. Run it from the repository's root:

Everything, about 30 minutes on 2 cores; --scaling takes about 3:
    $ python -m lab.benchmarks --json benchmark.json --plot benchmark.png

A try, in a minute:
    $ python -m lab.benchmarks --quick

One stage and function, two images, on one core:
    $ python -m lab.benchmarks --stages res4 --pairwise dot_product --batch 2 --threads 1
"""
# For how many seconds the implementations take turns, for each level and pass of a case.
BUDGET, QUICK_BUDGET = 1.0, 0.02
# With it, res2 has 3,840 positions: the functions differ, and what copies pairs is out of memory.
QUICK_IMAGE_SIZE = (192, 320)
CPU_LIMIT, QUICK_CPU_LIMIT = 8 * 2**30, 2 * 2**30
DEFAULT_SUBSAMPLE = ("none", "embeddings", "pyramid")
# A global context block does not subsample.
NO_CASES = {("global_context", subsample) for subsample in SUBSAMPLE if subsample != "none"}
# log2 of N for --scaling. The softmax takes O(N^2) time, whoever computes it, and stops early.
# The other functions with a softmax cost what the embedded Gaussian does.
SCALING_FUNCTIONS = ("embedded_gaussian", "dot_product", "concatenation")
POWERS, QUICK_POWERS, MAX_SOFTMAX_POWER = range(10, 19), range(7, 12), 15


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if results differ, or if something of ours could not be measured."""
    args = parse_arguments(arguments)
    machine = describe_machine(args.device, args.threads)
    print(machine_line(machine), file=sys.stderr)
    rows, is_complete = _measure_cases(_scaling_cases(args) if args.scaling else _cases(args), args)
    if not rows:
        sys.exit("nothing could be measured")
    print(tables(rows, "github" if args.markdown else "simple", growth=args.scaling))
    if args.json:
        mode = "scaling" if args.scaling else "comparison"
        content = {"machine": machine, mode: [row.as_dict() for row in rows]}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        (plot_growth if args.scaling else plot_ratios)(rows, args.plot)
    statuses = [(row.implementation, row.outcome.status) for row in rows]
    is_sound = all(s == MEASURED if name == OURS else s != DIFFERS for name, s in statuses)
    return 0 if is_complete and is_sound else 1


def _cases(args: argparse.Namespace) -> list[Case]:
    size = QUICK_IMAGE_SIZE if args.quick else Case.image_size
    return [
        Case(stage, pairwise, subsample, args.batch, size)
        for stage in args.stages or (["res2"] if args.quick else STAGES)
        for subsample in args.subsample or (["none"] if args.quick else DEFAULT_SUBSAMPLE)
        for pairwise in args.pairwise or FUNCTIONS
        if (pairwise, subsample) not in NO_CASES
    ]


def _scaling_cases(args: argparse.Namespace) -> list[Case]:
    """res2, whose embeddings have 128 channels, of images that give N positions."""
    stride = STAGES["res2"][1]
    return [
        Case("res2", f, "none", args.batch, (stride << power // 2, stride << (power + 1) // 2))
        for f in args.pairwise or SCALING_FUNCTIONS
        for power in (QUICK_POWERS if args.quick else POWERS)
        if f in ("dot_product", "concatenation") or power <= MAX_SOFTMAX_POWER
    ]


def _measure_cases(
    cases: Sequence[Case], args: argparse.Namespace
) -> tuple[list[MeasuredPass], bool]:
    """The rows of all cases, and whether all could be measured."""
    levels, names = ((OPERATION,), (OURS, TEXTBOOK)) if args.scaling else (tuple(PASSES), NAMES)
    budget = QUICK_BUDGET if args.quick else BUDGET
    limits = {"device": args.device, "threads": args.threads, "memory_limit": args.memory_limit}
    rows: list[MeasuredPass] = []
    is_complete = True
    for case in (progress := tqdm(cases, unit="case")):
        progress.set_description(str(case))
        try:
            rows += run_limited(compare, case, args.device, budget, levels, names, **limits)
        except (BrokenProcessPool, RuntimeError, MemoryError) as error:
            is_killed = isinstance(error, BrokenProcessPool)
            if not is_killed and not is_out_of_memory(error):
                raise
            reason = "the process was killed" if is_killed else "the memory limit is too low"
            progress.write(f"{case}: {reason}", file=sys.stderr)
            is_complete = False
    return rows, is_complete


@exit_on_user_error()
def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Errors of the user end the process."""
    parser = Parser(HELP)
    parser.prog, parser.usage = "python -m lab.benchmarks", "%(prog)s [options]"
    add = parser.add_argument
    for option, legal, default in (
        ("--stages", tuple(STAGES), "all"),
        ("--pairwise", FUNCTIONS, "all"),
        ("--subsample", SUBSAMPLE, ", ".join(DEFAULT_SUBSAMPLE)),
    ):
        words = f"of {', '.join(legal)} (default: {default})"
        add(option, nargs="+", choices=legal, metavar=option[2:].upper(), help=words)
    add("--batch", type=positive_int, default=1, help="images (default: 1)")
    scaling = "instead: the operation over N = 1k ... 256k positions, with exponents"
    add("--scaling", action="store_true", help=scaling)
    add("--quick", action="store_true", help="res2 of a small image, not pooled, and short timing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)")
    threads = torch.get_num_threads()
    add("--threads", type=positive_int, default=threads, help="on the CPU (default: %(default)s)")
    words = (
        "what an implementation may take before it counts as out of memory (default: on the CPU 8, "
        "with --quick 2, or 80%% of what is available; on a GPU all of it). On a CPU only Linux "
        "heeds it"
    )
    add("--memory-limit", type=_gibibytes, metavar="GIB", help=words)
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--json", type=_file, metavar="FILE", help="write all figures to FILE")
    add("--plot", type=_picture, metavar="FILE", help="draw them, as .png, .svg, ...")
    parser.add_overwrite()
    args = parser.parse_args(arguments)
    for option in ("json", "plot"):
        if path := getattr(args, option):
            check_target(f"--{option}", path, overwrite=args.overwrite)
    if args.scaling and (args.stages or args.subsample):
        parser.error("--stages and --subsample have no meaning with --scaling")
    if args.scaling and "global_context" in (args.pairwise or ()):
        parser.error("--pairwise global_context has no operation of its own for --scaling")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is 'cuda', but PyTorch finds no CUDA device here")
    args.device = torch.device(args.device)
    if args.memory_limit is None and args.device.type == "cpu":
        limit = QUICK_CPU_LIMIT if args.quick else CPU_LIMIT
        args.memory_limit = min(limit, int(0.8 * available_memory()))
    return args


def _gibibytes(text: str) -> int:
    if not re.fullmatch(r"\d*\.?\d+", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(float(text) * 2**30)


def _file(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {Path(text).parent}")
    return Path(text)


def _picture(text: str) -> Path:
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(text).suffix[1:] not in kinds:
        raise argparse.ArgumentTypeError(f"{text} has to end in one of .{', .'.join(kinds)}")
    return _file(text)


if __name__ == "__main__":
    sys.exit(main())
