"""Tell what the non-local blocks of a model cost: parameters, multiply-adds, time and memory.

    python tools/analyze.py \\
        --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.yaml
    python tools/analyze.py --config-file configs/quick_start.yaml --size 256 384 --json cost.json
    python tools/analyze.py --config-file configs/quick_start.yaml --train 10
    python tools/analyze.py --config-file output/quick_start/config.yaml \\
        --weights output/quick_start/model_final.pth --image shapes.png

The model runs with its blocks and, in turn with that, with the identity in the place of each: one
image, in inference, on the GPU if there is one. Times are medians, and their ratio is the median of
the ratios of two runs after each other. GMACs are 1e9 multiply-adds, as fvcore counts them, which
calls them GFLOPs; others count each as two FLOPs. Memory is the peak beyond weights and input.

Without --weights they are random, and would find nothing in an image. So that the heads have work,
the image is then faint noise and the score threshold 0, and they get as many regions as the config
allows: the most that they can cost. With --weights and --image the heads get what is found in the
image. KEY VALUE pairs override the config.

--train N also trains, on the config's data and with its batch size, N iterations with the blocks
and in turn with those N without them, and tells how many there are in a second, the share of that
time in which the model waits for data, and the peak memory with all that is held: weights,
gradients, the optimizer's state. The learning rate is 0, and nothing is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor

from lab.cost import Cost, CostReport, TrainingCost, measure_cost, measure_training
from nl_detectron.config import build_config
from nl_detectron.data import build_train_loader
from nl_detectron.engine import Trainer
from nl_detectron.engine.command_line import Parser, exit_on_user_error, positive_int
from nl_detectron.engine.predictor import Predictor, image_mapper, trained_config
from nl_detectron.engine.setup import check_datasets, register_datasets, use_cpu_without_cuda
from nl_detectron.files import check_target

COST_HEADERS = ("parameters (M)", "GMACs", "time (ms)", "peak memory (MiB)")
# Regions that are nothing likely would be dropped.
RANDOM_WEIGHTS = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
# Faint enough for the box regression of random weights to leave the anchors where they are.
NOISE = 1e-4


@exit_on_user_error()
def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_with_overrides(arguments)
    if args.json:
        sources = filter(None, (args.config_file, args.weights, args.image))
        check_target("--json", args.json, sources, overwrite=args.overwrite)
    report = run(args)
    print(table(report))
    figures = dataclasses.asdict(report)
    if args.train:
        costs = run_training(args)
        print(f"\n{training_table(*costs)}")
        names = ("training_with_blocks", "training_without_blocks")
        figures |= {name: dataclasses.asdict(cost) for name, cost in zip(names, costs)}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_model_arguments(weights="trained weights (default: random)")
    image = parser.add_mutually_exclusive_group()
    image.add_argument("--image", metavar="FILE", help="an image, resized as in evaluation")
    size = "of the random image (default: the sides that the config allows in evaluation)"
    image.add_argument("--size", type=positive_int, nargs=2, metavar=("H", "W"), help=size)
    calls = "timed calls (default: %(default)s)"
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help=calls)
    parser.add_argument("--train", type=positive_int, metavar="N", help="iterations of training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_overwrite()
    parser.add_overrides()
    return parser


def run(args: argparse.Namespace) -> CostReport:
    if bool(args.weights) != bool(args.image):
        raise ValueError("--weights and --image are needed together, or neither")
    if args.weights:
        cfg = trained_config(args.config_file, args.weights, args.opts)
        inputs = [image_mapper(cfg)({"file_name": args.image})]
        return measure_cost(Predictor(cfg).model, inputs, args.repeats)
    cfg = build_config(args.config_file, [*RANDOM_WEIGHTS, *args.opts])
    use_cpu_without_cuda(cfg)
    inputs = [{"image": faint_noise(cfg, args.size or evaluation_size(cfg))}]
    torch.manual_seed(0)  # the same random weights each time
    return measure_cost(build_model(cfg), inputs, args.repeats)


def run_training(args: argparse.Namespace) -> tuple[TrainingCost, TrainingCost]:
    cfg = build_config(args.config_file, args.opts)
    cfg.SOLVER.BASE_LR = 0.0
    register_datasets(cfg)
    check_datasets(cfg)
    use_cpu_without_cuda(cfg)
    model = Trainer.build_model(cfg)  # in training mode
    trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
    optimizer = Trainer.build_optimizer(cfg, model)
    return measure_training(trainer_class(model, build_train_loader(cfg), optimizer), args.train)


def evaluation_size(cfg: CfgNode) -> tuple[int, int]:
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        raise ValueError("INPUT.MIN_SIZE_TEST is 0, so images have any size: name one with --size")
    return cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST


def faint_noise(cfg: CfgNode, size: tuple[int, int]) -> Tensor:
    """An image (C, H, W) of nearly the mean colour that the config subtracts."""
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN)[:, None, None]
    noise = torch.randn(len(mean), *size, generator=torch.Generator().manual_seed(0))
    return mean + NOISE * noise


def table(report: CostReport) -> str:
    whole, rest = cost_row(report.with_blocks), cost_row(report.without_blocks)
    macs = report.with_blocks.macs
    ratios = [a / b for a, b in zip(whole, rest)]
    ratios[COST_HEADERS.index("time (ms)")] = report.time_ratio
    rows = [
        ("with blocks", *whole),
        ("without", *rest),
        ("difference", *(a - b for a, b in zip(whole, rest))),
        ("ratio", *ratios),
    ]
    block_rows = [
        (name, shapes(report.block_inputs[name]), *cost_row(cost), f"{cost.macs / macs:.1%}")
        for name, cost in report.blocks.items()
    ]
    model_table = tabulate(rows, ("model", *COST_HEADERS), floatfmt=".4g")
    headers = ("block, alone", "input", *COST_HEADERS, "of all GMACs")
    block_table = tabulate(block_rows, headers, floatfmt=".4g")
    return f"{model_table}\n\n{block_table}"


def training_table(whole: TrainingCost, rest: TrainingCost) -> str:
    rows = [
        (name, 1 / c.seconds, f"{c.data_share:.1%}", c.peak_memory / 2**20)
        for name, c in (("with blocks", whole), ("without", rest))
    ]
    ratio = ("ratio", rest.seconds / whole.seconds, "", whole.peak_memory / rest.peak_memory)
    headers = ("training", "iterations/s", "waiting for data", "peak memory (MiB)")
    return tabulate([*rows, ratio], headers, floatfmt=".4g")


def cost_row(cost: Cost) -> tuple[float, ...]:
    return cost.parameters / 1e6, cost.macs / 1e9, cost.seconds * 1e3, cost.peak_memory / 2**20


def shapes(inputs: list[tuple[int, ...]]) -> str:
    return ", ".join(" x ".join(map(str, shape)) for shape in inputs) or "never called"


if __name__ == "__main__":
    main()
