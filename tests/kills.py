#!/usr/bin/env python3
"""Kill small trainings at random moments, resume each to its end, and compare it with the run that
was never killed: weights, optimizer, schedule and metrics, bit for bit.

    $ tests/kills.py --kills 200
    $ tests/kills.py --kills 20 --plain    # what Detectron2's own trainer makes of it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_net  # noqa: E402
from nl_detectron.engine import Trainer, parse_arguments  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}
ITERATIONS = 24
NUM_THREADS = torch.get_num_threads()
OVERRIDES = [
    *("MODEL.DEVICE", "cpu", "SEED", "7", "SOLVER.MAX_ITER", str(ITERATIONS)),
    *("DATASETS.TRAIN", "('kills_train',)", "DATASETS.TEST", "('kills_val',)"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "5", "SOLVER.STEPS", "(12,)"),
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
        for channels, num_blocks in ((16, 1), (20, 1), (24, 2), (28, 1))
    ]
    stem = BasicStem(input_shape.channels, 16, "BN")
    resnet = ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES)
    return FPN(resnet, cfg.MODEL.FPN.IN_FEATURES, 16, top_block=LastLevelMaxPool())


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
    parser.add_argument("--processes", type=int, nargs="+", default=[1], choices=[1])
    parser.add_argument("--plain", action="store_true", help="Detectron2's DefaultTrainer instead")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # in this process, as OpenMP's do not outlive a fork
    register_few()
    rng = random.Random(args.seed)
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        references = {}
        # Detectron2's own stream depends on the number of workers; ours has one reference for all.
        for workers in set(args.workers) if args.plain else args.workers[:1]:
            start = time.monotonic()
            references[workers] = Path(folder, f"reference{workers}")
            status = wait(fork(references[workers], workers, args.plain))
            assert status == 0, (references[workers] / "output.txt").read_text()[-3000:]
            duration = time.monotonic() - start
        for number in range(args.kills):
            run = Path(folder, str(number))
            workers = args.workers[number % len(args.workers)]
            what = kill_and_resume(run, workers, duration, rng, args.plain)
            difference = compare(references[workers if args.plain else args.workers[0]], run)
            differences.append(difference)
            print(f"kill {number + 1}, {workers} workers, {what}: {difference or 'identical'}")
            sys.stdout.flush()
    identical = sum(difference is None for difference in differences)
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


def kill_and_resume(
    folder: Path, workers: int, duration: float, rng: random.Random, plain: bool
) -> str:
    """Kill a run, once, at a moment that is drawn, and resume it to its end; what was done."""
    number = rng.choice(SIGNALS[:1] if plain else SIGNALS)
    to_all = rng.random() < 0.5
    while True:
        process = fork(folder, workers, plain)
        moment = rng.uniform(0.05, 0.95) * duration
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to_all else os.kill)(process, number)
        status = wait(process)
        if status:
            break
        shutil.rmtree(folder)  # it was faster
    output = (folder / "output.txt").read_text()
    # Before training, a signal does what it does in any program of Python.
    assert status in (-number, 128 + number) or "Starting training" not in output, output[-3000:]
    kept = (folder / "last_checkpoint").exists() and (folder / "last_checkpoint").read_text()
    status = wait(fork(folder, workers, plain, "--resume"))
    assert status == 0, (status, (folder / "output.txt").read_text()[-3000:])
    return f"{number.name} to {'all' if to_all else 'one'} at {moment:.2f} s, from {kept or 'none'}"


def fork(folder: Path, workers: int, plain: bool, *words: str) -> int:
    """
    Start a run in a child, with all imports done; more processes of a run would start here.

    Returns:
        Its process id, which is that of its group, too.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    torch.set_num_threads(NUM_THREADS)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder.mkdir(exist_ok=True)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        train(folder, workers, plain, *words)
        status = 0
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def train(folder: Path, workers: int, plain: bool, *words: str) -> None:
    """Train, in this process."""
    config = ["--config-file", str(ROOT / "configs" / "quick_start.yaml"), *words]
    loading = ["DATALOADER.NUM_WORKERS", str(workers), "OUTPUT_DIR", str(folder)]
    args = parse_arguments([*config, *OVERRIDES, *loading])
    if not plain:
        train_net.main(args)
        return
    trainer = PlainTrainer(train_net.setup(args))
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


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
