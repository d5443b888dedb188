#!/usr/bin/env python3
"""Train or evaluate what one of Detectron2's LazyConfigs (a config in Python) describes.

    $ tools/lazy_train_net.py --num-gpus 8 \\
        --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.py
    $ tools/lazy_train_net.py --config-file ... --eval-only train.init_checkpoint=model_final.pth
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_setup,
    default_writers,
    defaults,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from nl_detectron.data import TrainLoader
from nl_detectron.engine import ExactResume, Interruption, NonLocalCheckpointer, launch
from nl_detectron.engine.arguments import add_training_options, check_machines
from nl_detectron.engine.command_line import Parser, exit_on_user_error
from nl_detectron.engine.hooks import BlockWeightsHook, NoEvaluationAfterFailureHook
from nl_detectron.engine.interruption import sole_run
from nl_detectron.engine.setup import check_weights_exist, set_up_logging
from nl_detectron.project import use_project

logger = logging.getLogger("nl_detectron")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Detectron2's own command line, with the options for loading weights and for errors."""
    parser = Parser(__doc__)
    add_training_options(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="overrides of the config")
    args = parser.parse_intermixed_args(arguments)
    if not args.config_file.endswith(".py"):
        parser.error(f"--config-file is {args.config_file!r}, not a .py; see train_net.py for YAML")
    check_machines(parser, args)
    return args


def build_config(args: argparse.Namespace) -> DictConfig:
    """The config file with the overrides (``key.subkey=value``)."""
    cfg = LazyConfig.load(args.config_file)
    try:
        return LazyConfig.apply_overrides(cfg, args.opts)
    except Exception as error:  # of Hydra's or OmegaConf's own kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"the overrides {' '.join(args.opts)}: {reason}") from error


def setup(args: argparse.Namespace) -> DictConfig:
    """The config; without CUDA, ``train.device`` becomes "cpu"."""
    cfg = build_config(args)
    set_up_logging(cfg.train.output_dir)
    if not args.resume:
        check_weights_exist("train.init_checkpoint", cfg.train.init_checkpoint)
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        logger.info("There is no CUDA device: train.device is set to cpu.")
        cfg.train.device = "cpu"
    default_setup(cfg, args)
    return cfg


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results


def prepare_training(
    cfg: DictConfig, model: nn.Module, args: argparse.Namespace
) -> Callable[[], None]:
    """Build the trainer with its hooks, and load; what is returned trains."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    block_weights = BlockWeightsHook(model, cfg.train.log_period)
    model = defaults.create_ddp_model(model, **cfg.train.ddp)
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    if cfg.dataloader.train._target_ is build_detection_train_loader:
        cfg.dataloader.train._target_ = TrainLoader
    trainer = trainer_class(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = build_checkpointer(cfg, model, args, trainer=trainer)
    trainer.register_hooks(
        [
            block_weights,
            NoEvaluationAfterFailureHook(),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        ]
    )
    if comm.is_main_process():
        trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)])
    interruption = Interruption(checkpointer)
    trainer.register_hooks([interruption, ExactResume(checkpointer, cfg.train.get("seed", -1))])
    trainer.register_hooks([hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model))])
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period)])

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    # A checkpoint holds the iteration that was just finished.
    start = trainer.iter + 1 if checkpointer.resumed else 0

    def train() -> None:
        with interruption.watch():
            trainer.train(start, cfg.train.max_iter)

    return train


def build_checkpointer(
    cfg: DictConfig, model: nn.Module, args: argparse.Namespace, **checkpointables: Any
) -> NonLocalCheckpointer:
    return NonLocalCheckpointer(
        model,
        cfg.train.output_dir,
        strict=args.strict_weights,
        report=args.weights_report,
        **checkpointables,
    )


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    with contextlib.ExitStack() as run:
        # Errors of the user show up until all is built and loaded; later ones are the program's.
        with exit_on_user_error(traceback=args.traceback):
            for project in args.project:  # in the processes that launch has spawned
                use_project(project)
            if not args.eval_only:
                run.enter_context(sole_run(build_config(args).train.output_dir))
            cfg = setup(args)
            model = instantiate(cfg.model).to(cfg.train.device)
            if args.eval_only:
                checkpointer = build_checkpointer(cfg, model, args)
                checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
            else:
                train = prepare_training(cfg, model, args)

        if not args.eval_only:
            train()
            return None
        with exit_on_user_error((OSError,), traceback=args.traceback):  # of data that is not there
            return evaluate(cfg, defaults.create_ddp_model(model))


if __name__ == "__main__":
    launch(main, parse_arguments())
