#!/usr/bin/env python3
"""Try to make a block that starts from gamma = 0 learn sooner, for the table in docs/STUDY.md.

    python studies/zero_init_trials.py --seeds 1 2 3

The model is `zero_bn` of long_range.yaml. The table comes at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from torch import nn
from torch.optim import Optimizer

from nl_detectron import NonLocalBlock
from nl_detectron.analysis.metrics import last_aps
from nl_detectron.config import build_config
from nl_detectron.engine import Trainer
from nl_detectron.engine.command_line import Parser
from nl_detectron.engine.setup import use_cpu_without_cuda
from nl_detectron.modeling import nonlocal_blocks

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "long_range.yaml"


@dataclass(frozen=True)
class Trial:
    # The child of the block, or "" for all of it, and what its learning rate is multiplied by.
    faster: tuple[str, int] | None = None
    weight_std: float | None = None  # of theta, phi, g and W_z; usually 0.01
    overrides: Mapping[str, object] = field(default_factory=dict)


TRIALS = {
    "block_lr_10": Trial(faster=("", 10)),
    "gamma_lr_100": Trial(faster=("norm", 100)),
    "std_0.1_gamma_lr_100": Trial(faster=("norm", 100), weight_std=0.1),
    "warm-up_200": Trial(overrides={"SOLVER.WARMUP_ITERS": 200}),
    "iterations_1500": Trial(overrides={"SOLVER.MAX_ITER": 1500, "SOLVER.STEPS": "(1200,)"}),
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument(
        "--output", type=Path, default=Path("output", "studies", "zero_init_trials"), metavar="DIR"
    )
    args = parser.parse_args()
    logging.disable(logging.INFO)
    rows = []
    for name in args.trials:
        results = [
            run(TRIALS[name], seed, args.output / name / f"seed_{seed}") for seed in args.seeds
        ]
        aps = ("AP", "AP50")
        rows.append(
            (f"`{name}`", *(" / ".join(f"{r[f'bbox/{ap}']:.1f}" for r in results) for ap in aps))
        )
    headers = ("trial", "box AP, by seed", "box AP50")
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def run(trial: Trial, seed: int, output: Path) -> dict[str, float]:
    """Train, and return the last APs."""

    class TrialTrainer(Trainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            model = super().build_model(cfg)
            block = the_block(model)
            if trial.weight_std is not None:
                for conv in (block.theta, block.phi, block.g, block.out):
                    nn.init.normal_(conv.weight, std=trial.weight_std)
            return model

        @classmethod
        def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
            optimizer = super().build_optimizer(cfg, model)
            if trial.faster:
                child, factor = trial.faster
                multiply_rate(optimizer, the_block(model).get_submodule(child), factor)
            return optimizer

    overrides = {
        **trial.overrides,
        "MODEL.NONLOCAL.ZERO_INIT": True,
        "TEST.EVAL_PERIOD": 100,
        "SEED": seed,
        "OUTPUT_DIR": output,
    }
    cfg = build_config(CONFIG, [str(word) for item in overrides.items() for word in item])
    use_cpu_without_cuda(cfg)
    output.mkdir(parents=True, exist_ok=True)
    seed_all_rng(seed)
    trainer = TrialTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return last_aps(output)


def the_block(model: nn.Module) -> NonLocalBlock:
    (block,) = nonlocal_blocks(model).values()
    return block


def multiply_rate(optimizer: Optimizer, module: nn.Module, factor: int) -> None:
    """Move the module's parameters into groups of their own, whose learning rate is higher."""
    faster = {id(parameter) for parameter in module.parameters()}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in faster]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in faster]
            optimizer.add_param_group({**group, "params": moved, "lr": factor * group["lr"]})


if __name__ == "__main__":
    main()
