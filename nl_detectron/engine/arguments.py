"""The command line of train_net.py, and the config that it asks for."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from nl_detectron.config import add_nonlocal_config
from nl_detectron.data import configure_for_dataset, register_coco_json
from nl_detectron.engine.launch import add_launch_options, fit_norms
from nl_detectron.validation import did_you_mean

logger = logging.getLogger(__name__)

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

Your own data in COCO's format; the number of classes and keypoints is read from it:
    $ train_net.py --config-file ... --train-json train.json --train-images train/ \\
        --val-json val.json --val-images val/
"""

_OWN_DATA = ("train_json", "train_images", "val_json", "val_images")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Detectron2's own command line, with a user's data added. Options may also come after the
    ``KEY VALUE`` overrides, where Detectron2's would take them for overrides.

    Args:
        arguments: the words of the command line; those of this process by default.

    Returns:
        Detectron2's ``config_file``, ``resume``, ``eval_only``, ``num_gpus``, ``num_machines``,
        ``machine_rank``, ``dist_url``, ``opts``; and ``train_json``, ``train_images``,
        ``val_json``, ``val_images`` (None where not given), ``weights_report`` and
        ``strict_weights``.
    """
    parser = default_argument_parser(epilog=EPILOG)
    parser.description = "Train or evaluate a Detectron2 model with non-local blocks."
    (overrides,) = (action for action in parser._actions if action.dest == "opts")
    overrides.nargs = "*"
    # Values such as -1e-4 are no options either.
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    overrides.metavar = "KEY VALUE"
    overrides.help = "config keys and their values, such as SOLVER.BASE_LR 0.01"
    add_weights_options(parser)
    add_launch_options(parser)
    own = parser.add_argument_group("your own data, in COCO's format (all four together)")
    own.add_argument("--train-json", metavar="FILE", help="annotations to train on")
    own.add_argument("--train-images", metavar="DIR", help="folder of the images in it")
    own.add_argument("--val-json", metavar="FILE", help="annotations to evaluate on")
    own.add_argument("--val-images", metavar="DIR", help="folder of the images in it")

    args = parser.parse_intermixed_args(arguments)
    if not args.config_file:
        parser.error("--config-file is needed, such as configs/quick_start.yaml")
    if not Path(args.config_file).is_file():
        parser.error(f"--config-file {args.config_file} does not exist")
    if len(args.opts) % 2:
        parser.error(f"overrides come in pairs of KEY VALUE, but got {' '.join(args.opts)}")
    if 0 < sum(getattr(args, name) is not None for name in _OWN_DATA) < len(_OWN_DATA):
        parser.error(
            "--train-json, --train-images, --val-json and --val-images are needed together"
        )
    num_gpus = torch.cuda.device_count()
    if args.num_gpus > max(num_gpus, 1):
        parser.error(f"--num-gpus is {args.num_gpus}, but this machine has {num_gpus}")
    return args


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights-report`` and ``--strict-weights``, which NonLocalCheckpointer explains."""
    weights = parser.add_argument_group("loading MODEL.WEIGHTS, or what --resume goes on from")
    weights.add_argument(
        "--weights-report", action="store_true", help="log every tensor and what became of it"
    )
    weights.add_argument(
        "--strict-weights",
        action="store_true",
        help="stop if anything but new non-local blocks starts fresh, or if any weights are unused",
    )


def build_config(args: argparse.Namespace) -> CfgNode:
    """
    The config that a command line asks for: Detectron2's defaults, ``MODEL.NONLOCAL``, the config
    file (plain YAML only: a tag that would run Python is an error), the overrides.

    Raises:
        FileNotFoundError: there is no such config file.
        KeyError: an unknown config key; the message names the nearest one.
        ValueError: an override has no value, or the file cannot be read as a config; the message
            names it.
    """
    if not Path(args.config_file).is_file():
        raise FileNotFoundError(f"the config {args.config_file} does not exist")
    if len(args.opts) % 2:
        raise ValueError(f"overrides come in pairs of KEY VALUE, but got {' '.join(args.opts)}")
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    try:
        cfg.merge_from_file(args.config_file, allow_unsafe=False)
    # The parsers know only sound files: on others they fail with any error at all.
    except Exception as error:
        if message := _unknown_key(cfg, error):
            raise KeyError(f"{args.config_file}: {message}") from None
        hint = (
            " (a config is plain YAML here and runs no Python)" if "python/" in str(error) else ""
        )
        raise ValueError(
            f"{args.config_file} cannot be read as a config: {type(error).__name__}: {error}{hint}"
        ) from error
    try:
        cfg.merge_from_list(args.opts)
    except (KeyError, AssertionError) as error:
        if message := _unknown_key(cfg, error):
            raise KeyError(message) from None
        raise
    return cfg


def fit_config(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Fit a config, in place, to what there is: the user's data, if the command line names any, and
    the device: without CUDA, ``MODEL.DEVICE`` becomes "cpu".

    Raises:
        FileNotFoundError: ``MODEL.WEIGHTS`` is a file that does not exist.
        FileNotFoundError, ValueError: see ``register_coco_json`` and ``configure_for_dataset``.
    """
    weights = cfg.MODEL.WEIGHTS
    if weights and not args.resume and is_missing_file(weights):
        raise FileNotFoundError(f"MODEL.WEIGHTS is {weights}, a file that does not exist")
    if args.train_json is not None:
        register_coco_json("train", args.train_json, args.train_images)
        register_coco_json("val", args.val_json, args.val_images)
        try:
            configure_for_dataset(cfg, "train", "val")
        except ValueError as error:
            raise ValueError(f"{args.train_json}, {args.val_json}: {error}") from error
    fit_device(cfg)
    fit_norms(cfg)


def fit_device(cfg: CfgNode) -> None:
    """Without CUDA, make ``MODEL.DEVICE`` "cpu", in place."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.info("There is no CUDA device: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"


def is_missing_file(weights: str) -> bool:
    """Do the weights, which may also be a URL, name a file that does not exist?"""
    return "://" not in weights and not Path(weights).is_file()


def score(text: str) -> float:
    """
    A confidence, from the command line.

    Raises:
        ValueError, ArgumentTypeError: it is no number from 0 to 1.
    """
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def message_of(error: Exception) -> str:
    """What an error says, without the quotes that KeyError puts around it."""
    return str(error.args[0] if isinstance(error, KeyError) else error)


def _unknown_key(cfg: CfgNode, error: Exception) -> str | None:
    """What to say of an error of yacs, if it is about an unknown key."""
    unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", str(error))
    if unknown is None:
        return None
    return f"Unknown config key {unknown[1]}{did_you_mean(unknown[1], _keys(cfg))}"


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys.extend(_keys(value, f"{prefix}{key}."))
    return keys
