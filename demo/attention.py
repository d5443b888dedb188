#!/usr/bin/env python3
"""Show what counts for points of an image in a model's non-local blocks.

For each image NAME.png is written to --output, with arrows from the points to the places that count
most for them, and NAME.html, a page that shows it for whatever is under the pointer (of about 8 MB
at most, mostly far less). The colours say how many times the mean each place counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger
from torch import nn
from tqdm import tqdm

from nl_detectron.analysis.attention import AttentionRecord, record_attention
from nl_detectron.analysis.attention_figure import draw_attention
from nl_detectron.analysis.attention_page import write_attention_page
from nl_detectron.analysis.attention_record import check_points
from nl_detectron.analysis.contribution import WHAT
from nl_detectron.analysis.placement import Point
from nl_detectron.analysis.recording import choose_blocks, scoring_blocks
from nl_detectron.engine import NonLocalCheckpointer
from nl_detectron.engine.command_line import Parser, exit_on_user_error, score
from nl_detectron.engine.predictor import model_files, trained_config
from nl_detectron.engine.setup import use_cpu_without_cuda

EPILOG = """
Examples:

The model that `make demo` trains, asked at the centres of the objects that it finds:
    $ demo/attention.py output/quick_start picture.png

Two points of a photograph, given as x,y in pixels, in one of the blocks, with ten arrows each:
    $ demo/attention.py output photo.jpg --points 320,240 100,80 --block res4.nonlocal4 --arrows 10

What speaks for and against the classes of the objects found:
    $ demo/attention.py output photo.jpg --show effect

Untrained, but worth a look: the plain Gaussian compares the features of an ImageNet classifier:
    $ demo/attention.py --weights R-50.pkl --input photo.jpg --at grid --show weights \\
        --config-file configs/ablations/mask_rcnn_R_50_FPN_nl_gaussian_1x.yaml

The config that fits weights best is the config.yaml that train_net.py writes beside them. CUDA is
used where there is some, else the CPU.
"""

MAX_OBJECTS = 6
GRID = 3


def make_parser() -> Parser:
    parser = Parser(__doc__, EPILOG)
    parser.add_model_arguments(or_run=True)
    parser.add_argument("--input", nargs="+", metavar="IMAGE", help="the same as behind RUN")
    parser.add_argument(
        "--output",
        type=Path,
        default="output/attention",
        metavar="DIR",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--show",
        choices=WHAT,
        default="contributions",
        help="weights: what a point attends to; contributions (the default): what each place adds "
        "to it, its weight times its value; effect: that of each place on the score of the object "
        "that the point is in",
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--points", nargs="+", type=point, metavar="X,Y", help="points to ask, in pixels"
    )
    asked.add_argument(
        "--at",
        choices=("objects", "grid"),
        default="objects",
        help=f"or the centres of the objects found, up to {MAX_OBJECTS} (the default), or a grid "
        f"of {GRID} x {GRID} points",
    )
    parser.add_argument(
        "--confidence", type=score, default=0.5, help="lowest score of objects (%(default)s)"
    )
    parser.add_argument(
        "--block",
        nargs="+",
        default=[],
        metavar="NAME",
        help="blocks by their names or what these end in, such as res4.nonlocal4 (default: all)",
    )
    parser.add_argument(
        "--arrows", type=count, default=5, metavar="K", help="at most, per point (%(default)s)"
    )
    parser.add_argument(
        "--plain", action="store_true", help="nothing but the image, the points and the arrows"
    )
    parser.add_argument(
        "--flip", action="store_true", help="mirror what the model sees, as test-time augmentation"
    )
    parser.add_overrides("but not right behind --input, --points or --block")
    return parser


def point(text: str) -> Point:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form X,Y") from None
    return x, y


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_with_overrides(arguments)
    setup_logger(name="nl_detectron")
    with exit_on_user_error():
        cfg = trained_config(*model_files(args), args.opts)
        args.input = [Path(image) for image in (*args.images, *(args.input or ()))]
        check_images(args)
        model = load_model(cfg, args.block, args.show)
        args.output.mkdir(parents=True, exist_ok=True)
    resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    for path in tqdm(args.input, unit="image"):
        record = record_attention(
            model,
            read_image(path),
            blocks=args.block,
            augmentation=T.AugmentationList([resize, T.RandomFlip(float(args.flip))]),
            input_format=cfg.INPUT.FORMAT,
            min_score=args.confidence,
            effects=args.show == "effect",
        )
        write_attention_page(args.output / f"{path.stem}.html", record, title=path.name)
        if points := args.points or choose_points(record, args.at):
            figure = draw_attention(
                record.maps(points, args.show), arrows=args.arrows, plain=args.plain
            )
            figure.savefig(args.output / f"{path.stem}.png", bbox_inches="tight")
        else:
            tqdm.write(
                f"{path}: nothing found with a score of {args.confidence}, so no {path.stem}.png"
            )
    print(f"What counts for the points is drawn in {args.output}")


def check_images(args: argparse.Namespace) -> None:
    """OSError, ValueError: an image cannot be read, lacks a point, or would be replaced."""
    if not args.input:
        raise ValueError("images are needed, behind RUN or --input")
    stems = [path.stem for path in args.input]
    for path in args.input:
        check_points(args.points or [], read_image(path))
        if stems.count(path.stem) > 1:
            raise ValueError(f"--input has several images of the name {path.stem}")
        if (args.output / f"{path.stem}.png").resolve() == path.resolve():
            raise ValueError(f"{path} would be replaced; name another folder with --output")


def read_image(path: Path) -> np.ndarray:
    """BGR, 8 bits, turned as its EXIF says."""
    image = cv2.imread(str(path))
    if image is None:
        raise OSError(f"{path} cannot be read as an image")
    return image


def load_model(cfg: CfgNode, blocks: Sequence[str], what: str) -> nn.Module:
    use_cpu_without_cuda(cfg)
    model = build_model(cfg)
    # An error before the weights are loaded.
    scoring_blocks(model, blocks) if what == "effect" else choose_blocks(model, blocks)
    NonLocalCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def choose_points(record: AttentionRecord, at: str) -> list[Point]:
    if at == "objects":
        left, top, right, bottom = record.boxes[:MAX_OBJECTS].T
        return list(zip(((left + right) / 2).tolist(), ((top + bottom) / 2).tolist()))
    height, width = record.image.shape[:2]
    centres = [(i + 0.5) / GRID for i in range(GRID)]
    return [(x * width, y * height) for y in centres for x in centres]


if __name__ == "__main__":
    main()
