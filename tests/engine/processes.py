"""Runs of several processes, forked from the test: what was imported is there already."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from nl_detectron.engine import launch

SECONDS = 300  # far more than needed, on a machine that does nothing else


def run_processes(
    world_size: int, main: Callable[[argparse.Namespace], Any], args: argparse.Namespace
) -> list[Any]:
    """
    ``launch(main, args)`` in processes with the environment that torchrun gives them; with one
    alone, in a process without it.

    Returns:
        What ``main`` returns, of each rank: what can be pickled; no tensors.

    Raises:
        RuntimeError: a process failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        fork.Process(target=_child, args=(rank, world_size, port, pipe[1], main, args))
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    results = []
    try:
        for rank, (receiver, _) in enumerate(pipes):
            if not receiver.poll(SECONDS):
                raise RuntimeError(f"rank {rank} gave no result in {SECONDS} s")
            is_sound, result = receiver.recv()
            if not is_sound:
                raise RuntimeError(f"rank {rank}: {result}")
            results.append(result)
    finally:
        for process in processes:
            process.join(1)
            process.kill()
    return results


def end_of(process: int, seconds: float = SECONDS) -> int:
    """
    Wait for a forked process.

    Returns:
        The exit status; less than 0 if a signal ended it.

    Raises:
        AssertionError: it has not ended by then; it is killed.
    """
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise AssertionError(f"{process} did not end in {seconds} s")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def _child(
    rank: int,
    world_size: int,
    port: int,
    pipe: Any,
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
) -> None:
    torch.set_num_threads(1)
    results = []
    if world_size > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        numbers |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        launch(lambda args: results.append(main(args)), args)
        pipe.send((True, results[0]))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
