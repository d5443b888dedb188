"""What a process knows of its run before any other process is asked."""

import argparse
import functools
import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

from nl_detectron.engine import build_config, launch, parse_arguments
from nl_detectron.engine.launch import ProcessPlace, waiting_time
from nl_detectron.engine.setup import use_sync_bn_of_cpu

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
QUICK_START = [
    "--config-file",
    str(Path(__file__).resolve().parents[2] / "configs" / "quick_start.yaml"),
]


@pytest.fixture
def one_process_of_torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.setenv(name, "1" if name.endswith("SIZE") else "0")


def test_place_from_the_environment():
    assert ProcessPlace.from_environment(TORCHRUN) == ProcessPlace(5, 8, 1, 4)
    for name in TORCHRUN:
        rest = {key: value for key, value in TORCHRUN.items() if key != name}
        assert ProcessPlace.from_environment(rest) is None


def test_uneven_machines_are_refused():
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE is 3, which does not divide WORLD_SIZE"):
        ProcessPlace.from_environment({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"})


def test_without_torchrun_and_with_one_process(monkeypatch, one_process_of_torchrun):
    args = parse_arguments(QUICK_START)
    seen = []
    launch(seen.append, args)
    for name in TORCHRUN:
        monkeypatch.delenv(name)
    launch(seen.append, args)
    assert seen == [args, args]


@pytest.mark.parametrize(
    ("option", "max_restarts", "num_gpus", "message"),
    [
        ({"num_gpus": 2}, "0", 0, "--num-gpus is for runs without torchrun"),
        ({"num_machines": 2}, "0", 0, "--num-machines is for runs without torchrun"),
        ({}, "3", 0, "--max-restarts is 3.*: add --resume"),
        ({"resume": True}, "3", 0, None),
        ({"eval_only": True}, "3", 0, None),
        ({}, "0", 1, "--nproc-per-node is 2, but this machine has 1 GPUs"),
    ],
)
def test_options_that_do_not_fit(
    option, max_restarts, num_gpus, message, monkeypatch, one_process_of_torchrun
):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", max_restarts)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    if num_gpus:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("WORLD_SIZE", "2")
    args = argparse.Namespace(**{**vars(parse_arguments(QUICK_START)), **option})
    seen = []
    if message is None:
        launch(seen.append, args)
        assert seen == [args]
        return
    with pytest.raises(SystemExit, match=message):
        launch(seen.append, args)
    assert seen == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_sync_bn_on_cpus(world_size, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    words = ["MODEL.NONLOCAL.NORM", "SyncBN", "MODEL.DEVICE", "cpu"]
    args = parse_arguments([*QUICK_START, *words])
    cfg = build_config(args.config_file, args.opts)
    use_sync_bn_of_cpu(cfg)
    expected = {1: "SyncBN", 2: "naiveSyncBN_N"}[world_size]
    assert expected == cfg.MODEL.NONLOCAL.NORM
    assert cfg.MODEL.RESNETS.NORM == "BN"
    cfg.MODEL.NONLOCAL.NORM, cfg.MODEL.DEVICE = "SyncBN", "cuda"
    use_sync_bn_of_cpu(cfg)
    assert cfg.MODEL.NONLOCAL.NORM == "SyncBN"


def spawn(main, num_processes, *, args, **_):
    """Detectron2's launch, without its GPUs."""
    torch.multiprocessing.start_processes(
        call, (main, args), num_processes, start_method="fork", daemon=False
    )


def call(rank, main, args):
    main(*args)


def end_with(status, args):
    sys.exit(status)


def end_by(number, args):
    os.kill(os.getpid(), number)


def stop_by_parent(args):
    """As a run that is told to stop does; what comes again would be too much."""
    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    os.kill(os.getppid(), signal.SIGTERM)
    deadline = time.monotonic() + 30
    while not received and time.monotonic() < deadline:
        time.sleep(0.01)
    sys.exit(143 if len(received) == 1 else 1)


@pytest.mark.parametrize(
    ("main", "status", "message"),
    [
        (functools.partial(end_with, 2), 2, ""),
        (functools.partial(end_by, signal.SIGKILL), 137, "signal SIGKILL\n"),
        (stop_by_parent, 143, ""),
    ],
    ids=["status", "killed", "stopped"],
)
def test_spawned_processes_end_the_run_with_their_status(main, status, message, monkeypatch, capfd):
    module = importlib.import_module("nl_detectron.engine.launch")
    monkeypatch.setattr(module, "launch_spawned", spawn)
    args = argparse.Namespace(**{**vars(parse_arguments(QUICK_START)), "num_gpus": 2})
    if main is stop_by_parent:
        args.num_gpus, args.num_machines = 1, 2
    with pytest.raises(SystemExit) as end:
        launch(main, args)
    assert end.value.code == status
    assert capfd.readouterr().err.endswith(message)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def need_theirs(args):
    sys.exit(0 if "theirs" in sys.modules else 1)


def test_spawned_processes_import_the_projects(monkeypatch, tmp_path):
    (tmp_path / "theirs.py").touch()
    monkeypatch.setattr(
        importlib.import_module("nl_detectron.engine.launch"), "launch_spawned", spawn
    )
    args = {**vars(parse_arguments(QUICK_START)), "num_gpus": 2}
    launch(need_theirs, argparse.Namespace(**{**args, "project": [str(tmp_path / "theirs.py")]}))
    with pytest.raises(SystemExit):
        launch(need_theirs, argparse.Namespace(**args))


def test_timeout():
    assert parse_arguments(QUICK_START).timeout == 10
    args = parse_arguments([*QUICK_START, "--timeout", "0.5"])
    launch(lambda _: None, args)
    assert waiting_time().total_seconds() == 30
