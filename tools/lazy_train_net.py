#!/usr/bin/env python3
"""Train or evaluate what one of Detectron2's LazyConfigs (a config in Python) describes.

    $ tools/lazy_train_net.py --num-gpus 8 \\
        --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.py
    $ tools/lazy_train_net.py --config-file ... --eval-only train.init_checkpoint=model_final.pth

Detectron2's own script does it, too (python -m nl_detectron.run .../lazyconfig_train_net.py); this
one has what train_net.py has: exact resume, signals, the report of the weights, errors in one line.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import AMPTrainer, SimpleTrainer, default_setup, default_writers, defaults
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig

from nl_detectron.data import TrainLoader
from nl_detectron.engine import ExactResume, Interruption, NonLocalCheckpointer, launch
from nl_detectron.engine.arguments import add_training_options, check_machines
from nl_detectron.engine.command_line import Parser, exit_on_user_error
from nl_detectron.engine.hooks import BlockWeightsHook, hooks_of_run
from nl_detectron.engine.interruption import sole_run
from nl_detectron.engine.run_config import keep_values_of_checkpoint, values_to_keep
from nl_detectron.engine.setup import check_weights_exist, device_here, set_up_logging


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_training_options(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="overrides of the config")
    args = parser.parse_intermixed_args(arguments)
    if not args.config_file.endswith(".py"):
        parser.error(f"--config-file is {args.config_file!r}, not a .py; see train_net.py for YAML")
    check_machines(parser, args)
    return args


def build_config(args: argparse.Namespace) -> DictConfig:
    cfg = LazyConfig.load(args.config_file)
    try:
        return LazyConfig.apply_overrides(cfg, args.opts)
    except Exception as error:  # of Hydra's or OmegaConf's own kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"the overrides {' '.join(args.opts)}: {reason}") from error


def setup(cfg: DictConfig, args: argparse.Namespace) -> None:
    set_up_logging(cfg.train.output_dir)
    if not args.resume:
        check_weights_exist("train.init_checkpoint", cfg.train.init_checkpoint)
    elif not args.eval_only:
        keep_values_of_checkpoint(cfg, cfg.train.output_dir)
    cfg.train.device = device_here("train.device", cfg.train.device)
    default_setup(cfg, args)


def evaluate(cfg: DictConfig, model: Any) -> dict[str, Any]:
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results


def build_trainer(
    cfg: DictConfig, model: Any, checkpointer: NonLocalCheckpointer, interruption: Interruption
) -> SimpleTrainer:
    config = values_to_keep(cfg)
    exact_resume = ExactResume(checkpointer, cfg.train.get("seed", -1), config=config)
    cfg.optimizer.params.model = checkpointer.model
    if cfg.dataloader.train._target_ is build_detection_train_loader:
        cfg.dataloader.train._target_ = TrainLoader
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    loader, optimizer = instantiate(cfg.dataloader.train), instantiate(cfg.optimizer)
    trainer = trainer_class(model, loader, optimizer)
    factors = {key: cfg.optimizer.params.get(key, 1.0) for key in ("gamma_lr_factor", "lr_factor")}
    is_main = comm.is_main_process()
    hooks = hooks_of_run(
        interruption,
        exact_resume,
        BlockWeightsHook(checkpointer.model, cfg.train.log_period, **factors),
        evaluate=lambda: evaluate(cfg, model),
        writers=default_writers(cfg.train.output_dir, cfg.train.max_iter) if is_main else [],
        batch_size=cfg.dataloader.train.total_batch_size,
        checkpointing=cfg.train.checkpointer,
        eval_period=cfg.train.eval_period,
        write_period=cfg.train.log_period,
        scheduler=instantiate(cfg.lr_multiplier),
    )
    trainer.register_hooks(hooks)
    checkpointer.add_checkpointable("trainer", trainer)
    return trainer


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    with contextlib.ExitStack() as run:
        # Errors of the user show up until all is built and loaded; later ones are the program's.
        with exit_on_user_error(traceback=args.traceback):
            cfg = build_config(args)
            if not args.eval_only:
                run.enter_context(sole_run(cfg.train.output_dir))
            setup(cfg, args)
            model = instantiate(cfg.model).to(cfg.train.device)
            options = {"strict": args.strict_weights, "report": args.weights_report}
            checkpointer = NonLocalCheckpointer(model, cfg.train.output_dir, **options)
            model = defaults.create_ddp_model(model, **({} if args.eval_only else cfg.train.ddp))
            if not args.eval_only:
                interruption = Interruption(checkpointer)
                trainer = build_trainer(cfg, model, checkpointer, interruption)
            checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)

        if args.eval_only:
            with exit_on_user_error((OSError,), traceback=args.traceback):  # of missing data
                return evaluate(cfg, model)
        with interruption.watch():
            # A checkpoint holds the iteration that was just finished.
            trainer.train(trainer.iter + 1 if checkpointer.resumed else 0, cfg.train.max_iter)
        return None


if __name__ == "__main__":
    launch(main, parse_arguments())
