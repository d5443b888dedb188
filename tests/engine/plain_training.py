"""Detectron2's own trainer on train_net.py's command line, evaluating as ours does."""

from detectron2.engine import DefaultTrainer

import train_net
from nl_detectron.engine import Trainer, build_config, parse_arguments


class PlainTrainer(DefaultTrainer):
    build_evaluator = Trainer.build_evaluator


if __name__ == "__main__":
    args = parse_arguments()
    cfg = build_config(args.config_file, args.opts)
    train_net.setup(cfg, args)
    trainer = PlainTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
