"""Loader workers that live exactly as long as the run needs them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable

_SECONDS = 0.5
_FILES_OF_WORKER = 8  # queues, pipes, what tells of its end
_TENSORS_OF_SAMPLE = 4  # picture, boxes, classes, masks or keypoints; each comes as an open file


def check_open_files(num_workers: int, num_samples: int) -> None:
    """Raise this process's limit of open files to what workers that have so many samples ready
    need: without enough of them they can hang. ValueError: the system does not allow so many."""
    if not num_workers:
        return
    needed = len(os.listdir("/dev/fd"))
    needed += num_workers * (_FILES_OF_WORKER + _TENSORS_OF_SAMPLE * num_samples)
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != highest < needed:
        raise ValueError(
            f"ulimit -n is {highest}, but {num_workers} loader workers (DATALOADER.NUM_WORKERS) "
            f"may need {needed} open files: raise it, or take fewer"
        )
    if resource.RLIM_INFINITY != limit < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, highest))


def belonging_to_parent(init: Callable[[int], None] | None = None) -> Callable[[int], None]:
    """Return a ``worker_init_fn`` for torch's ``DataLoader``, which also calls ``init``. With it,
    SIGINT, SIGTERM and SIGUSR1 to the whole group of processes leave the workers alone: it is the
    run that stops, after a step for which it may need them. What ends a worker, at once, is its
    parent's SIGTERM (torch's to a late one, Python's at its exit) or its parent's death."""
    return functools.partial(_begin, init)


def _begin(init: Callable[[int], None] | None, worker_id: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    # macOS cannot wait for a signal and learn who sent it: there SIGTERM ends a worker, as ever.
    if parent is not None and hasattr(signal, "sigtimedwait"):
        # A handler would not be told who sent it, and torch has replaced ours by its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_end, args=(parent,), daemon=True).start()
    if init is not None:
        init(worker_id)


def _await_end(parent: multiprocessing.process.BaseProcess) -> None:
    forked_by = os.getppid()  # the parent, or the server that forks for it
    while parent.is_alive() and os.getppid() == forked_by:
        received = signal.sigtimedwait({signal.SIGTERM}, _SECONDS)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)  # anything else would be an error to torch
