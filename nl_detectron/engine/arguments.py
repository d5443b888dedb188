"""The command line of train_net.py, and what tools/lazy_train_net.py has of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.engine import default_argument_parser

from nl_detectron.engine.command_line import Parser
from nl_detectron.engine.launch import add_launch_options
from nl_detectron.files import missing

EPILOG = """
Examples:

Train a small model on built-in data, in minutes on a CPU:
    $ train_net.py --config-file configs/quick_start.yaml

Train Mask R-CNN with one non-local block on COCO (in $DETECTRON2_DATASETS/coco), on 8 GPUs:
    $ train_net.py --num-gpus 8 \\
        --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.yaml

The same with torchrun, which also runs on many machines, and on CPUs:
    $ torchrun --nproc-per-node 8 train_net.py --config-file ...

On another number of GPUs, with batch size, learning rate and schedule scaled to it:
    $ train_net.py --num-gpus 2 --config-file ... SOLVER.REFERENCE_WORLD_SIZE 8

Go on with an interrupted run; evaluate what it has learnt:
    $ train_net.py --config-file ... --resume
    $ train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

What became of every tensor of some weights; an error if anything but new blocks starts fresh:
    $ train_net.py --config-file ... --weights-report --strict-weights MODEL.WEIGHTS model.pth

Your own photographs, with annotations in COCO's format; the run's config.yaml keeps their places:
    $ train_net.py --finetune --config-file ... --train-json train.json --train-images train/ \\
        --val-json val.json --val-images val/
    $ train_net.py --eval-only --config-file output/config.yaml MODEL.WEIGHTS output/model_final.pth
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Detectron2's own command line, with a user's data added. Options may also come after the
    ``KEY VALUE`` overrides, where Detectron2 would take them for overrides. An error ends the
    process with exit status 2.

    Args:
        arguments: the words of the command line; those of this process by default.

    Returns:
        The options by Detectron2's names, such as ``config_file`` and ``opts``; of data, None
        where not given.
    """
    parser = Parser("Train or evaluate a Detectron2 model with non-local blocks.", EPILOG)
    add_training_options(parser)
    group = parser.add_argument_group(
        "your own data, in COCO's format (all four together; OUTPUT_DIR/config.yaml keeps them)"
    )
    group.add_argument("--train-json", metavar="FILE", help="annotations to train on")
    group.add_argument("--train-images", metavar="DIR", help="folder of the images in it")
    group.add_argument("--val-json", metavar="FILE", help="annotations to evaluate on")
    group.add_argument("--val-images", metavar="DIR", help="folder of the images in it")
    parser.add_argument(
        "--finetune",
        action="store_true",
        help="batch, rate, iterations and more for so many photographs on this machine, starting "
        "from MODEL.WEIGHTS; what KEY VALUE sets stays (docs/TRAINING.md)",
    )
    parser.add_overrides()

    args = parser.parse_with_overrides(arguments)
    if not args.config_file:
        parser.error("--config-file is needed, such as configs/quick_start.yaml")
    if args.config_file.endswith(".py"):
        parser.error(f"--config-file {args.config_file} is Python: use tools/lazy_train_net.py")
    if problem := missing(args.config_file):
        parser.error(f"--config-file {args.config_file} {problem}")
    for name in ("train_json", "train_images", "val_json", "val_images"):
        if (path := getattr(args, name)) is not None and not Path(path).exists():
            parser.error(f"--{name.replace('_', '-')} {path} does not exist")
    if args.finetune and args.eval_only:
        parser.error("--finetune is for training, not for --eval-only")
    check_machines(parser, args)
    return args


def check_machines(parser: Parser, args: argparse.Namespace) -> None:
    """End the process with exit status 2 if there cannot be such machines and GPUs."""
    num_gpus = torch.cuda.device_count()
    if not 1 <= args.num_gpus <= max(num_gpus, 1):
        legal = f"from 1 to {num_gpus}, as this machine has" if num_gpus else "1 without a GPU"
        parser.error(f"--num-gpus is {args.num_gpus}, but must be {legal}")
    if args.num_machines < 1:
        parser.error(f"--num-machines is {args.num_machines}, but must be at least 1")
    if not 0 <= args.machine_rank < args.num_machines:
        last = args.num_machines - 1
        parser.error(f"--machine-rank is {args.machine_rank}, but must be from 0 to {last}")
    if args.num_machines > 1 and not num_gpus:
        parser.error(f"--num-machines {args.num_machines} needs GPUs; torchrun --nnodes does not")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of Detectron2's ``default_argument_parser``, less its overrides, which take
    all that comes after the first of them; and ours for errors, for loading weights and for
    launching."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="config of the training")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, and do not train")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where in the code an error in config, weights or data arose",
    )
    weights = parser.add_argument_group("loading MODEL.WEIGHTS, or what --resume goes on from")
    weights.add_argument(
        "--weights-report", action="store_true", help="log every tensor and what became of it"
    )
    weights.add_argument(
        "--strict-weights",
        action="store_true",
        help="stop if anything but new non-local blocks starts fresh, or if any weights are unused",
    )
    machines = parser.add_argument_group("several GPUs and machines, without torchrun")
    machines.add_argument("--num-gpus", type=int, default=1, help="per machine")
    machines.add_argument("--num-machines", type=int, default=1)
    machines.add_argument("--machine-rank", type=int, default=0, help="0, 1, ... of this machine")
    machines.add_argument(
        "--dist-url",
        default=default_argument_parser().get_default("dist_url"),
        help="where the processes find each other (default: %(default)s); see PyTorch's "
        "torch.distributed",
    )
    add_launch_options(parser)
