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
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    defaults,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from nl_detectron.engine import NonLocalCheckpointer, launch
from nl_detectron.engine.arguments import add_weights_options
from nl_detectron.engine.hooks import BlockWeightsHook, NoEvaluationAfterFailureHook
from nl_detectron.engine.launch import add_launch_options

logger = logging.getLogger("nl_detectron")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Detectron2's own command line, with the options for loading weights."""
    parser = default_argument_parser(epilog=" ")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_weights_options(parser)
    add_launch_options(parser)
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
    model = defaults.create_ddp_model(model, **cfg.train.ddp)
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
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
    trainer.register_hooks([hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model))])
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period)])

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    # A checkpoint holds the iteration that was just finished.
    start = trainer.iter + 1 if args.resume and checkpointer.has_checkpoint() else 0
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
    cfg = setup(args)
    model = instantiate(cfg.model).to(cfg.train.device)
    if not args.eval_only:
        train(cfg, model, args)
        return None
    checkpointer = build_checkpointer(cfg, model, args)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    return evaluate(cfg, defaults.create_ddp_model(model))


if __name__ == "__main__":
    launch(main, parse_arguments())
