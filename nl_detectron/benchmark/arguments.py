"""The command line of ``python -m nl_detectron.benchmark``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nl_detectron.benchmark.cases import STAGES
from nl_detectron.benchmark.child import default_memory_limit
from nl_detectron.layers.nonlocal_block import PAIRWISE, SUBSAMPLE

EPILOG = """
Without --scaling or --accuracy: time and peak memory of the block (forward, forward + backward) and
of the operation alone (forward + backward), side by side with the N x N form as one writes it from
the equation, and with mmcv, PyTorchVideo and timm, where they are installed and compute the same.
All have the same weights and inputs, and their results and gradients are compared before anything
is timed.

Examples:

Everything, about 22 minutes on 2 cores; --accuracy takes about 5, --scaling about 2:
    $ python -m nl_detectron.benchmark --json benchmark.json --plot benchmark.png

A try, in seconds:
    $ python -m nl_detectron.benchmark --quick

One stage and function, two images, on one core:
    $ python -m nl_detectron.benchmark --stages res4 --pairwise dot_product --batch 2 --threads 1
"""

# The options that not all modes read.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "comparison": {
        "stages": tuple(STAGES),
        "pairwise": PAIRWISE,
        "subsample": ("none", "embeddings"),
        "batch": 1,
    },
    # With given theta and phi the Gaussian is the embedded one.
    "scaling": {"pairwise": ("embedded_gaussian", "dot_product", "concatenation")},
    "accuracy": {},
}
# What --quick takes where nothing else is asked for.
_QUICK_DEFAULTS = {"stages": ("res3", "res4"), "subsample": ("none",)}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with defaults filled in. Errors of the user end the process."""
    parser = argparse.ArgumentParser(
        prog="python -m nl_detectron.benchmark",
        usage="%(prog)s [options]",
        description="Time, memory and accuracy of the non-local operation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--scaling",
        dest="mode",
        action="store_const",
        const="scaling",
        help="instead: the cost of the operation over N = 1k ... 256k positions, with exponents",
    )
    mode.add_argument(
        "--accuracy",
        dest="mode",
        action="store_const",
        const="accuracy",
        help="instead: errors in float32 against float64, for up to 70,000 positions",
    )
    _add_choices(parser, "--stages", tuple(STAGES))
    _add_choices(parser, "--pairwise", PAIRWISE)
    _add_choices(parser, "--subsample", SUBSAMPLE)
    parser.add_argument("--batch", type=_positive, help="images (default: 1)")
    parser.add_argument("--quick", action="store_true", help="few cases, small inputs, for a try")
    parser.add_argument("--device", help="cpu or cuda (default: cuda, if there is any)")
    parser.add_argument(
        "--threads",
        type=_positive,
        default=torch.get_num_threads(),
        help="of PyTorch on the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-limit",
        type=_gibibytes,
        metavar="GIB",
        help="what an implementation may take before it counts as out of memory (default: on the "
        "CPU 8, or 80%% of what is available; on a GPU all of it). On a CPU only Linux heeds it",
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .png, .svg, ...")
    parser.set_defaults(mode="comparison")
    args = parser.parse_args(arguments)
    _fill_in_defaults(parser, args)
    _check_files(parser, args)
    args.device = _device(parser, args.device)
    if args.memory_limit is None:
        args.memory_limit = default_memory_limit(args.device)
    return args


def _add_choices(parser: argparse.ArgumentParser, option: str, legal: Sequence[str]) -> None:
    name = option.strip("-")
    default = _DEFAULTS["comparison"][name]
    said = "all" if default == legal else " and ".join(default)
    parser.add_argument(
        option,
        nargs="+",
        choices=legal,
        metavar=name.upper(),
        help=f"of {', '.join(legal)} (default: {said})",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def _gibibytes(text: str) -> int:
    try:
        size = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return size


def _fill_in_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The defaults depend on the mode; options that the mode does not read are refused."""
    if args.plot and args.mode == "accuracy":
        parser.error("--plot has no meaning with --accuracy")
    defaults = {**_DEFAULTS[args.mode], **(_QUICK_DEFAULTS if args.quick else {})}
    for option in _DEFAULTS["comparison"]:
        if getattr(args, option) is None:
            setattr(args, option, defaults.get(option))
        elif option not in _DEFAULTS[args.mode]:
            parser.error(f"--{option} has no meaning with --{args.mode}")


def _check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for option in ("json", "plot"):
        file = getattr(args, option)
        if file and not file.parent.is_dir():
            parser.error(f"--{option} {file}: there is no folder {file.parent}")
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if args.plot and args.plot.suffix[1:] not in kinds:
        parser.error(f"--plot {args.plot}: the file has to end in one of .{', .'.join(kinds)}")


def _device(parser: argparse.ArgumentParser, name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        parser.error(f"--device is {name!r}, but must be cpu or cuda")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device is {name!r}, but must be cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device is {name!r}, but PyTorch finds no CUDA device here")
    return device
