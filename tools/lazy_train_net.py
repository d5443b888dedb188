#!/usr/bin/env python3
"""Train or evaluate what one of Detectron2's LazyConfigs (a config in Python) describes.

    $ tools/lazy_train_net.py --num-gpus 8 \\
        --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.py
    $ tools/lazy_train_net.py --config-file ... --eval-only train.init_checkpoint=model_final.pth
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from nl_detectron.data import TrainLoader
from nl_detectron.engine import ExactResume, Interruption, NonLocalCheckpointer
from nl_detectron.engine.arguments import add_weights_options
from nl_detectron.engine.hooks import BlockWeightsHook
from nl_detectron.engine.interruption import sole_run

logger = logging.getLogger("nl_detectron")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Detectron2's own command line, with the options for loading weights."""
    parser = default_argument_parser(epilog=" ")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_weights_options(parser)
    args = parser.parse_args(arguments)
    if not args.config_file.endswith(".py"):
        parser.error(f"--config-file is {args.config_file!r}, not a .py; see train_net.py for YAML")
    return args


def setup(args: argparse.Namespace) -> DictConfig:
    """
    The config file with the overrides (``key.subkey=value``); without CUDA, ``train.device``
    becomes "cpu".
    """
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    setup_logger(cfg.train.output_dir, name="nl_detectron", distributed_rank=comm.get_rank())
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


def train(cfg: DictConfig, model: nn.Module, args: argparse.Namespace) -> None:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    block_weights = BlockWeightsHook(model, cfg.train.log_period)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    if cfg.dataloader.train._target_ is build_detection_train_loader:
        cfg.dataloader.train._target_ = TrainLoader
    trainer = trainer_class(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = build_checkpointer(cfg, model, args, trainer=trainer)
    trainer.register_hooks(
        [
            block_weights,
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
    with interruption.watch():
        trainer.train(start, cfg.train.max_iter)


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
    if not args.eval_only:
        overridden = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
        with sole_run(overridden.train.output_dir):
            cfg = setup(args)
            train(cfg, instantiate(cfg.model).to(cfg.train.device), args)
        return None
    cfg = setup(args)
    model = instantiate(cfg.model).to(cfg.train.device)
    checkpointer = build_checkpointer(cfg, model, args)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    return evaluate(cfg, create_ddp_model(model))


if __name__ == "__main__":
    args = parse_arguments()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
