#!/usr/bin/env python3
"""What exact resume costs an iteration: our trainer and Detectron2's own take turns in one process,
on configs/quick_start.yaml. CPU time is what other processes on the machine disturb least.

    $ tests/resume_cost.py --rounds 20
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nl_detectron.engine import Trainer, build_config  # noqa: E402

ITERATIONS = 5  # of a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    trainers, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for trainer_class in (DefaultTrainer, Trainer):
            name = f"{trainer_class.__module__.partition('.')[0]}'s trainer"
            trainers[name] = build(trainer_class, folder)
            turn(trainers[name])  # to warm up
            seconds[name] = []
        for number in range(rounds):
            order = list(trainers)
            for name in order if number % 2 else reversed(order):
                seconds[name].append(turn(trainers[name]))
    means = {}
    for name, turns in seconds.items():
        means[name] = [sum(column) / rounds / ITERATIONS for column in zip(*turns)]
        print(f"{name}: {means[name][0]:.4f} s of CPU, {means[name][1]:.4f} s an iteration")
    plain, ours = means.values()
    print(f"ratio of CPU times: {ours[0] / plain[0]:.4f}; of times: {ours[1] / plain[1]:.4f}")
    middle = sorted(b[0] / a[0] for a, b in zip(*seconds.values()))
    print(f"median ratio of CPU times of a round: {middle[rounds // 2]:.4f}")


def build(trainer_class: type[DefaultTrainer], folder: str) -> DefaultTrainer:
    overrides = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", folder]
    cfg = build_config(ROOT / "configs" / "quick_start.yaml", overrides)
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = 10**6
    trainer = trainer_class(cfg)
    trainer.storage = EventStorage()
    with trainer.storage:
        trainer.before_train()
    return trainer


def turn(trainer: DefaultTrainer) -> tuple[float, float]:
    """Some iterations; the seconds of CPU and of time that they took."""
    start = time.process_time(), time.perf_counter()
    with trainer.storage:
        for _ in range(ITERATIONS):
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            trainer.iter += 1
    return time.process_time() - start[0], time.perf_counter() - start[1]


if __name__ == "__main__":
    main()
