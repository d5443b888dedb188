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
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_net  # noqa: E402
from nl_detectron.engine import Trainer, launch, parse_arguments  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}
ITERATIONS = 24
NUM_THREADS = torch.get_num_threads()
OVERRIDES = [
    *("MODEL.DEVICE", "cpu", "SEED", "7", "SOLVER.MAX_ITER", str(ITERATIONS)),
    *("DATASETS.TRAIN", "('kills_train',)", "DATASETS.TEST", "('kills_val',)"),
    *("SOLVER.WARMUP_ITERS", "5", "SOLVER.STEPS", "(12,)"),
    *("SOLVER.CHECKPOINT_PERIOD", "4", "TEST.EVAL_PERIOD", "10", "TEST.DETECTIONS_PER_IMAGE", "3"),
    *("INPUT.MIN_SIZE_TRAIN", "(32,48)", "INPUT.MIN_SIZE_TEST", "32", "INPUT.MAX_SIZE_TRAIN", "64"),
    *("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"),
    *("INPUT.CROP.ENABLED", "True", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[16,16]", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.NONLOCAL.BACKBONE", "build_thin_backbone", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"),
]


@BACKBONE_REGISTRY.register()
def build_thin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet-FPN with few channels and blocks."""
    stages = [
        ResNet.make_stage(
            BasicBlock,
            num_blocks,
            stride_per_block=[1 if channels == 16 else 2, 1][:num_blocks],
            in_channels=channels,
            out_channels=channels + 4,
            norm="BN",
        )
        for channels, num_blocks in ((16, 1), (20, 1), (24, 2))
    ]
    stem = BasicStem(input_shape.channels, 16, "BN")
    resnet = ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES)
    return FPN(resnet, cfg.MODEL.FPN.IN_FEATURES, 16)


class PlainTrainer(DefaultTrainer):
    """Detectron2's own, which evaluates as ours does."""

    build_evaluator = Trainer.build_evaluator


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
    torch.set_num_threads(1)  # in this process, as OpenMP's do not outlive a fork
    register_few()
    rng = random.Random(args.seed)
    kinds = list(itertools.product(args.processes, args.workers))
    references: dict[tuple[int, int], tuple[Path, float]] = {}
    identical = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.kills):
            processes, workers = kinds[number % len(kinds)]
            # Detectron2's own stream depends on the number of workers; ours has one reference.
            kind = (processes, workers if args.plain else args.workers[0])
            if kind not in references:
                start = time.monotonic()
                reference = Run(Path(folder, "reference{}-{}".format(*kind)), *kind, args.plain)
                assert wait(reference.start()) == 0, reference.output[-3000:]
                references[kind] = reference.folder, time.monotonic() - start
            run = Run(Path(folder, str(number)), processes, workers, args.plain)
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


def register_few() -> None:
    """The first pictures of the built-in shapes, for an evaluation that takes no time."""
    for split, count in (("train", 13), ("val", 2)):
        whole = f"shapes_{split}"
        records = DatasetCatalog.get(whole)[:count]
        DatasetCatalog.register(f"kills_{split}", lambda records=records: records)
        known = MetadataCatalog.get(whole).as_dict()
        del known["name"], known["json_file"]
        MetadataCatalog.get(f"kills_{split}").set(**known)


@dataclass
class Run:
    """A small training in a folder, which forks of this process do, with all imports done."""

    folder: Path
    processes: int
    workers: int
    plain: bool

    @property
    def output(self) -> str:
        """What it printed."""
        return (self.folder / "output.txt").read_text()

    def start(self, *words: str) -> int:
        """
        Start it, or with "--resume" go on with it.

        Returns:
            The process id, which is that of its group, too; with many processes, of their parent.
        """
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        os.setsid()
        self.folder.mkdir(exist_ok=True)
        output = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if self.processes > 1:
            os._exit(self._run_ranks(*words))
        self._run(*words)

    def _run(self, *words: str) -> None:
        """Train in this process, and end it."""
        torch.set_num_threads(NUM_THREADS if self.processes == 1 else 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 1
        try:
            self._train(*words)
            status = 0
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _run_ranks(self, *words: str) -> int:
        """What torchrun does: start all ranks; when one fails, end the others; the status."""
        for number in SIGNALS[1:]:
            signal.signal(number, signal.SIG_IGN)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        size = str(self.processes)
        ranks = set()
        for rank in map(str, range(self.processes)):
            process = os.fork()
            if not process:
                for number in SIGNALS[1:]:
                    signal.signal(number, signal.SIG_DFL)
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                os.environ.update(RANK=rank, LOCAL_RANK=rank)
                os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
                self._run(*words)
            ranks.add(process)
        while ranks:
            process, status = os.wait()
            ranks.remove(process)
            if status := os.waitstatus_to_exitcode(status):
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
                for _ in ranks:
                    os.wait()
                return status if status > 0 else 128 - status
        return 0

    def _train(self, *words: str) -> None:
        config = ["--config-file", str(ROOT / "configs" / "quick_start.yaml"), *words]
        own = ["DATALOADER.NUM_WORKERS", str(self.workers), "OUTPUT_DIR", str(self.folder)]
        own += ["SOLVER.IMS_PER_BATCH", str(2 * self.processes)]
        args = parse_arguments([*config, *OVERRIDES, *own])
        if not self.plain:
            launch(train_net.main, args)
            return
        trainer = PlainTrainer(train_net.setup(args))
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


def kill_and_resume(run: Run, duration: float, rng: random.Random) -> str:
    """Kill a run, once, at a moment that is drawn, and resume it to its end; what was done."""
    number = rng.choice(SIGNALS[:1] if run.plain else SIGNALS)
    victim = rng.choice(["all", *range(run.processes)])
    while True:
        process = run.start()
        moment = rng.uniform(0.05, 0.95) * duration
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError, IndexError):  # it has ended
            if victim == "all":
                os.killpg(process, number)
            else:
                os.kill(process if run.processes == 1 else children(process)[victim], number)
        status = wait(process)
        if status:
            break
        shutil.rmtree(run.folder)  # it was faster
    # Before training, a signal does what it does in any program of Python.
    is_expected = status in (-number, 128 + number) or "Starting training" not in run.output
    assert is_expected, (status, run.output[-3000:])
    tag = run.folder / "last_checkpoint"
    kept = tag.read_text() if tag.exists() else "none"
    status = wait(run.start("--resume"))
    assert status == 0, (status, run.output[-3000:])
    whom = victim if victim == "all" else f"rank {victim}"
    return f"{number.name} to {whom} at {moment:.2f} s, from {kept}"


def children(process: int) -> list[int]:
    """The ids of a process's children, in the order of their start."""
    return [
        int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def wait(process: int) -> int:
    """The exit status; if a signal ended it, less than 0."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


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
