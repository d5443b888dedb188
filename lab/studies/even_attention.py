#!/usr/bin/env python3
"""Train the model of long_range_match with attention that is forced even, for docs/STUDY.md.

    python lab/studies/even_attention.py --seeds 1 2 3

The block is the config's, with the same parameters, but its logits are multiplied by 0, so that
every place gets the mean of g over all places. The table comes at the end.
"""

from __future__ import annotations

import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate

from nl_detectron.analysis.metrics import last_aps
from nl_detectron.config import build_config
from nl_detectron.engine import Trainer
from nl_detectron.engine.command_line import Parser
from nl_detectron.engine.setup import check_datasets, use_cpu_without_cuda
from nl_detectron.modeling import NONLOCAL_BLOCK_REGISTRY

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "long_range_match.yaml"


@NONLOCAL_BLOCK_REGISTRY.register()
def EvenAttention(cfg: CfgNode, in_channels: int) -> CNNBlockBase:
    block = NONLOCAL_BLOCK_REGISTRY.get("NonLocalBlock")(cfg, in_channels)
    block.logit_scale = 0.0
    return block


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    output = Path("output", "studies", "even_attention")
    parser.add_argument("--output", type=Path, default=output, metavar="DIR")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    rows = [(seed, f"{run(seed, args.output / f'seed_{seed}'):.1f}") for seed in args.seeds]
    print(tabulate(rows, ("seed", "box AP50"), tablefmt="github", disable_numparse=True))


def run(seed: int, output: Path) -> float:
    """Train, and return the last AP50."""
    overrides = ["MODEL.NONLOCAL.BLOCK", "EvenAttention", "SEED", seed, "OUTPUT_DIR", str(output)]
    cfg = build_config(CONFIG, overrides)
    check_datasets(cfg)
    use_cpu_without_cuda(cfg)
    output.mkdir(parents=True, exist_ok=True)
    seed_all_rng(seed)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return last_aps(output)["bbox/AP50"]


if __name__ == "__main__":
    main()
