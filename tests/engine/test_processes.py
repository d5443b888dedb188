"""Runs of many processes on the CPU: torchrun as a user calls it, and N processes against one."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling.proposal_generator import proposal_utils

import nl_detectron.data.toy  # noqa: F401  its datasets
import train_net
from nl_detectron.engine import Trainer, build_config, parse_arguments
from tests.commands import ROOT, group_of, shared_commands
from tests.engine.processes import run_processes
from tests.engine.same_pictures import make_pictures

pytestmark = pytest.mark.slow

CONFIG = ["--config-file", str(ROOT / "configs" / "quick_start.yaml")]
SMALL = [
    *("MODEL.KEYPOINT_ON", "False", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "0", "SOLVER.STEPS", "()"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
]
# Each image has 48 anchors, which all become proposals, and 2 objects; half of all are sampled.
EQUAL_COUNTS = [
    *("MODEL.RPN.IN_FEATURES", "['p4']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[64]]"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.NMS_THRESH", "2.0", "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "0"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
    *("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[1e-6]"),
]
# Group norm needs no other image; SyncBN is naiveSyncBN_N here.
NORMS = [
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "GN", "MODEL.ROI_BOX_HEAD.NORM", "GN"),
    *("MODEL.ROI_MASK_HEAD.NORM", "GN", "MODEL.NONLOCAL.NORM", "SyncBN"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return make_pictures(folder, num_images=9)


def start_torchrun(folder, data, *words):
    """The ranks are processes of their own, from the start to the end of Python."""
    for name in ("stdout", "stderr"):
        (folder / name).write_text("")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "train_net.py"]
    overrides = ["OUTPUT_DIR", str(folder / "run"), "SOLVER.CHECKPOINT_PERIOD", "2"]
    command += [*CONFIG, *data, *SMALL, *overrides, *words]
    output, errors = folder / "stdout", folder / "stderr"
    return shared_commands().start(output, *command, errors=errors, cwd=folder)


def config_of(args):
    cfg = build_config(args.config_file, args.opts)
    train_net.setup(cfg, args)
    return cfg


def wait_for(file, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert process.status() is None, process.printed
        assert time.monotonic() < deadline, f"no {file}"
        time.sleep(0.1)


def process_of_rank(rank, agent):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"PPid:\t{agent}\n" in (folder / "status").read_text()
            if is_child and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                return int(folder.name)
        except OSError:  # it has just ended
            continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_torchrun_is_one_run_and_ends_with_any_of_its_processes(pictures, tmp_path):
    run = tmp_path / "run"
    words = ["SOLVER.MAX_ITER", "100000", "DATALOADER.NUM_WORKERS", "1"]
    torchrun = start_torchrun(tmp_path, pictures, *words)
    wait_for(run / "last_checkpoint", torchrun)
    ranks = [process_of_rank(rank, torchrun.process) for rank in range(2)]
    torchrun.send(signal.SIGKILL)
    assert torchrun.wait(60) == -signal.SIGKILL
    (run / "last_checkpoint").unlink()
    torchrun = start_torchrun(tmp_path, pictures, "--resume", *words)
    deadline = time.monotonic() + 30
    while any(group_of(rank) for rank in ranks):
        assert time.monotonic() < deadline, "ranks outlive torchrun"
        time.sleep(0.1)
    assert "Stopped by SIGTERM" in (run / "log.txt").read_text()  # with a checkpoint
    (run / "last_checkpoint").unlink()
    wait_for(run / "last_checkpoint", torchrun)
    os.kill(process_of_rank(1, torchrun.process), signal.SIGKILL)
    assert torchrun.wait(60) == 1
    cause = (tmp_path / "stderr").read_text().split("Root Cause")[1]
    assert "rank      : 1" in cause
    assert "SIGKILL" in cause

    last = (run / "last_checkpoint").read_text()
    iteration = torch.load(run / last, weights_only=False)["iteration"]
    torchrun = start_torchrun(tmp_path, pictures, "--resume", "SOLVER.MAX_ITER", str(iteration + 4))
    assert torchrun.wait(120) == 0
    screen = (tmp_path / "stdout").read_text()
    assert f"Starting training from iteration {iteration + 1}\n" in screen
    assert "Rank of current process: 0. World size: 2" in (run / "log.txt").read_text()
    for said_once in ("Starting training from", "Evaluation results for val", " tensors from "):
        assert screen.count(said_once) == 1, said_once
    names = Counter(path.name.split(".")[0] for path in run.iterdir())
    assert names["metrics"] == names["config"] == names["last_checkpoint"] == 1
    assert {path.name for path in run.glob("log*")} == {"log.txt", "log.txt.rank1"}
    assert (run / "model_final.pth").exists()
    records = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    iterations = [record["iteration"] for record in records if "total_loss" in record]
    assert len(set(iterations)) == len(iterations)
    assert iterations[-1] == iteration + 3


@pytest.mark.parametrize("last", [False, True], ids=["in_between", "in_the_last_iteration"])
def test_a_failing_rank_ends_the_run(last, pictures, tmp_path, capfd):
    """In the last iteration, too, where Detectron2 would evaluate, and wait for all ranks."""

    def fail(args):
        class FailingTrainer(Trainer):
            def run_step(self):
                if self.iter == (1 if last else 0) and os.environ["RANK"] == "0":
                    raise ValueError("this rank has a problem")
                super().run_step()

        FailingTrainer(config_of(args)).train()

    words = ["SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(tmp_path)]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 0: .*ValueError: this rank has a problem"):
        run_processes(2, fail, parse_arguments([*CONFIG, *pictures, *SMALL, *words]))
    assert time.monotonic() - start < 60
    assert "rank 0 of 2 failed: ValueError: this rank has a problem\n" in capfd.readouterr().err


@pytest.mark.parametrize("config", ["long_range", "long_range_match"])
def test_outputs_that_no_head_reads(config, tmp_path):
    """DistributedDataParallel refuses them by default, in the second step."""
    words = ["--config-file", str(ROOT / "configs" / f"{config}.yaml"), "SOLVER.MAX_ITER", "3"]
    words += ["SOLVER.STEPS", "()", "OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "2"]
    run_processes(2, train_without_evaluation, parse_arguments(words))
    assert (tmp_path / "model_final.pth").exists()


def train_without_evaluation(args):
    trainer = Trainer(config_of(args))
    trainer.test = lambda *_: {}
    trainer.train()


def meet_too_late(args):
    trainer = Trainer(config_of(args))
    if os.environ["RANK"] == "1":
        os._exit(0)
    trainer.train()


def test_a_rank_that_is_gone_before_training(tmp_path, capfd):
    start = time.monotonic()
    words = [*CONFIG, *SMALL, "OUTPUT_DIR", str(tmp_path)]
    with pytest.raises(RuntimeError, match=r"rank 0: "):
        run_processes(2, meet_too_late, parse_arguments(words))
    assert time.monotonic() - start < 60
    assert "rank 0 of 2 has lost another: " in capfd.readouterr().err


def train_in_float64(args):
    torch.set_default_dtype(torch.float64)
    # torchvision's NMS takes float32 alone; at threshold 2 it keeps all.
    proposal_utils.batched_nms = lambda boxes, scores, *_: scores.argsort(descending=True)
    cfg = config_of(args)
    trainer = Trainer(cfg)
    first = {n: p.detach().numpy().copy() for n, p in trainer.checkpointer.model.named_parameters()}
    trainer.test = lambda *_: {}
    trainer.train()
    final = {n: p.detach().numpy() for n, p in trainer.checkpointer.model.named_parameters()}
    return first, final


def test_two_processes_train_as_one(pictures, tmp_path):
    """
    A whole Mask R-CNN with a non-local block. Every loss is a sum over anchors or proposals,
    divided by as many as each process has: the mean over processes is that of one process. In
    float64 only the order of additions remains, about 1e-15; in float32 it changes which of two
    nearly equal things a maximum takes, and in 5 steps that grows to some 1e-3.
    """
    runs = []
    for world_size in (1, 2):
        output = ["OUTPUT_DIR", str(tmp_path / str(world_size)), "SOLVER.MAX_ITER", "5"]
        words = [*CONFIG, *pictures, *SMALL, *EQUAL_COUNTS, *NORMS, *output]
        runs.append(run_processes(world_size, train_in_float64, parse_arguments(words)))
    (one,), (two, other) = runs
    assert one[1].keys() == two[1].keys()
    moved = 0
    for name, weights in one[1].items():
        np.testing.assert_array_equal(two[1][name], other[1][name], err_msg=name)
        np.testing.assert_allclose(two[1][name], weights, rtol=0, atol=1e-12, err_msg=name)
        moved = max(moved, np.abs(weights - one[0][name]).max())
    assert moved > 1e-3


def evaluate(args):
    return train_net.main(args)


@pytest.fixture(scope="module")
def weights(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    words = [*CONFIG, *pictures, *SMALL, "OUTPUT_DIR", str(folder), "TEST.EVAL_PERIOD", "0"]
    args = parse_arguments([*words, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"])
    model = Trainer.build_model(config_of(args))
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize("world_size", [2, 4])
def test_evaluation_is_that_of_one_process(world_size, pictures, weights, tmp_path):
    """9 pictures: the processes have different numbers of them."""
    results, predictions = [], []
    for processes in (1, world_size):
        folder = tmp_path / str(processes)
        words = [*CONFIG, *pictures, "--eval-only", *SMALL, "OUTPUT_DIR", str(folder)]
        words += ["MODEL.WEIGHTS", str(weights), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
        results.append(run_processes(processes, evaluate, parse_arguments(words))[0])
        predictions.append((folder / "inference" / "coco_instances_results.json").read_bytes())
    assert predictions[0] == predictions[1]
    assert len(json.loads(predictions[0])) > 20
    np.testing.assert_equal(results[1], results[0])


def test_last_evaluation_is_that_of_the_final_weights(pictures, tmp_path):
    """With batch norm each process has statistics of its own, and those of rank 0 are saved."""
    words = [*CONFIG, *pictures, *SMALL, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(tmp_path)]
    words += ["MODEL.RESNETS.NORM", "BN", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    file = tmp_path / "inference" / "coco_instances_results.json"
    predictions = []
    for more in ([], ["--eval-only", "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]):
        run_processes(2, evaluate, parse_arguments([*words, *more]))
        predictions.append(json.loads(file.read_text()))
    assert len(predictions[0]) > 20
    assert predictions[0] == predictions[1]
