#!/usr/bin/env python3
"""Kill small trainings at random moments, resume each to its end, and compare it with the run that
was never killed: weights, optimizer, schedule and metrics, bit for bit.

    $ tests/kills.py --kills 200
    $ tests/kills.py --kills 20 --plain --processes 1    # what Detectron2's own trainer makes of it
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "engine")]

from commands import Command, Commands  # noqa: E402
from small_config import SMALL  # noqa: E402

TRAIN_NET, PLAIN = ROOT / "train_net.py", ROOT / "tests" / "engine" / "plain_training.py"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}
ITERATIONS = 24
SECONDS = 300  # of a whole run, on a busy machine
SECONDS_TO_END = 60  # torchrun's own limit is 30
MORE_OVERRIDES = [
    *("SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 10),
    *("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2, "INPUT.CROP.ENABLED", True),
]


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a resumed run differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader workers")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of a run")
    parser.add_argument("--plain", action="store_true", help="Detectron2's DefaultTrainer instead")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(arguments)
    rng = random.Random(args.seed)
    kinds = list(itertools.product(args.processes, args.workers))
    references: dict[tuple[int, int], tuple[Path, float]] = {}
    identical = 0
    with tempfile.TemporaryDirectory() as folder, Commands() as commands:
        for number in range(args.kills):
            processes, workers = kinds[number % len(kinds)]
            # Detectron2's own stream depends on the number of workers; ours has one reference.
            kind = (processes, workers if args.plain else args.workers[0])
            if kind not in references:
                path = Path(folder, "reference{}-{}".format(*kind))
                reference = Run(commands, path, *kind, args.plain)
                start = time.monotonic()
                reference.start()
                assert reference.wait() == 0, reference.output[-3000:]
                references[kind] = reference.folder, time.monotonic() - start
            run = Run(commands, Path(folder, str(number)), processes, workers, args.plain)
            expected, duration = references[kind]
            what = kill_and_resume(run, duration, rng)
            difference = compare(expected, run.folder)
            identical += difference is None
            print(
                f"kill {number + 1}, {processes} processes, {workers} workers, {what}: "
                f"{difference or 'identical'}",
                flush=True,
            )
            if difference is None:
                shutil.rmtree(run.folder)
    print(f"{identical} of {args.kills} resumed runs are identical to the uninterrupted one")
    return int(identical < args.kills)


@dataclass
class Run:
    """A small training in a folder, by the command line: one process, or the ranks of one run."""

    commands: Commands
    folder: Path
    processes: int
    workers: int
    plain: bool
    ranks: list[Command] = field(default_factory=list)

    @property
    def output(self) -> str:
        """What it printed."""
        return (self.folder / "output.txt").read_text()

    def start(self, *words: str) -> None:
        """Start it, or with "--resume" go on with it."""
        self.folder.mkdir(exist_ok=True)
        own = ["DATALOADER.NUM_WORKERS", self.workers, "OUTPUT_DIR", self.folder]
        own += ["SOLVER.IMS_PER_BATCH", 2 * self.processes]
        line = [PLAIN if self.plain else TRAIN_NET, *SMALL, *words, *MORE_OVERRIDES, *own]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        variables: dict[str, object] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables.update(WORLD_SIZE=self.processes, LOCAL_WORLD_SIZE=self.processes)
        self.ranks = []
        for rank in range(self.processes):
            if self.processes > 1:
                variables.update(RANK=rank, LOCAL_RANK=rank)
            output = self.folder / "output.txt"
            self.ranks.append(self.commands.start(output, *line, **variables))

    def wait(self, seconds: float = SECONDS) -> int:
        """
        As torchrun, end all when one fails, and wait for each.

        Returns:
            The status of the first that failed, 0 if none did.
        """
        deadline = time.monotonic() + seconds
        first = 0
        while not first and any(rank.status() is None for rank in self.ranks):
            first = next((status for rank in self.ranks if (status := rank.status())), 0)
            if time.monotonic() > deadline:
                break  # the wait below fails with the stacks
            time.sleep(0.05)
        if first:
            for rank in self.ranks:
                if rank.status() is None:
                    rank.send(signal.SIGTERM)
        statuses = [rank.wait(SECONDS_TO_END if first else 0.1) for rank in self.ranks]
        return first or next(filter(None, statuses), 0)


def kill_and_resume(run: Run, duration: float, rng: random.Random) -> str:
    """Kill a run, once, at a moment that is drawn, and resume it to its end; what was done."""
    number = rng.choice(SIGNALS[:1] if run.plain else SIGNALS)
    victims = rng.choice(["all", *range(run.processes)])
    while True:
        run.start()
        moment = rng.uniform(0.05, 0.95) * duration
        time.sleep(moment)
        for rank, command in enumerate(run.ranks):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                if victims == "all":
                    command.send(number, to_group=True)
                elif victims == rank:
                    command.send(number)
        status = run.wait(SECONDS if number == signal.SIGKILL else duration + SECONDS_TO_END)
        if status:
            break
        shutil.rmtree(run.folder)  # it was faster
    # Before training, a signal does what it does in any program of Python.
    is_expected = status in (-number, 128 + number) or "Starting training" not in run.output
    assert is_expected, (status, run.output[-3000:])
    tag = run.folder / "last_checkpoint"
    kept = tag.read_text() if tag.exists() else "none"
    run.start("--resume")
    status = run.wait()
    assert status == 0, (status, run.output[-3000:])
    whom = victims if victims == "all" else f"rank {victims}"
    return f"{number.name} to {whom} at {moment:.2f} s, from {kept}"


def compare(reference: Path, run: Path) -> str | None:
    """How the results of two runs differ, if they do."""
    ours, theirs = (torch.load(f / "model_final.pth", weights_only=False) for f in (run, reference))
    weights = [torch.cat([t.double().ravel() for t in c["model"].values()]) for c in (ours, theirs)]
    problems = []
    if difference := ((weights[0] - weights[1]).norm() / weights[1].norm()).item():
        problems.append(f"weights {difference:.2%}")
    for checkpoint in (ours, theirs):  # its digits of times differ
        checkpoint["trainer"]["hooks"].get("ExactResume", {}).pop("metrics_size", None)
    if paths := list(differing(ours, theirs)):
        problems.append(f"{len(paths)} values such as {paths[0]}")
    if metrics(run) != metrics(reference):
        problems.append("metrics.json")
    if list(run.glob(".*.draft")):
        problems.append("drafts are left")
    return ", ".join(problems) or None


def differing(one: object, other: object, path: str = "") -> Iterator[str]:
    """Where in two nested containers the values are not equal, bit for bit."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield path
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differing(one[key], other[key], f"{path}/{key}")
    elif repr(one) != repr(other):
        yield path


def metrics(folder: Path) -> list[str]:
    """The lines of metrics.json, less times."""
    lines = (folder / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [repr({k: v for k, v in record.items() if k not in TIMES}) for record in records]


if __name__ == "__main__":
    sys.exit(main())
