#!/usr/bin/env python3
"""Train or evaluate a Detectron2 model with non-local blocks. ``--help`` has examples."""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from nl_detectron.engine import (
    NonLocalCheckpointer,
    Trainer,
    build_config,
    fit_config,
    launch,
    parse_arguments,
)
from nl_detectron.engine.interruption import sole_run


def setup(args: argparse.Namespace) -> CfgNode:
    cfg = build_config(args)
    setup_logger(cfg.OUTPUT_DIR, name="nl_detectron", distributed_rank=comm.get_rank())
    fit_config(cfg, args)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args: argparse.Namespace) -> dict | None:
    if args.eval_only:
        cfg = setup(args)
        model = Trainer.build_model(cfg)
        checkpointer = NonLocalCheckpointer(
            model, cfg.OUTPUT_DIR, strict=args.strict_weights, report=args.weights_report
        )
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    with sole_run(build_config(args).OUTPUT_DIR):
        trainer = Trainer(setup(args))
        trainer.checkpointer.strict = args.strict_weights
        trainer.checkpointer.report = args.weights_report
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


if __name__ == "__main__":
    launch(main, parse_arguments())
