"""One run of many processes: torchrun's, or those that Detectron2 spawns for ``--num-gpus``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.engine import defaults
from detectron2.engine import launch as launch_spawned
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import ProcessExitedException

from nl_detectron.project import use_project

Main = Callable[[argparse.Namespace], Any]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # what tells a run to stop
TIMEOUT_MINUTES = 10.0  # more than rank 0 needs for an evaluation, in which the others wait for it
SECONDS_WITHOUT_PARENT = 10.0  # for the last step and the checkpoint when the parent is gone
_SECONDS_OF_POLL = 0.5
_SECONDS_TO_BE_ENDED = 5.0  # torchrun needs far less to see an end, and to end the others
_TIMEOUT = "NL_DETECTRON_TIMEOUT"  # in the environment: minutes that processes wait for each other


class ProcessPlace(NamedTuple):
    """A process among those of its run, on all machines and on its own (local)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ProcessPlace | None:
        """Read a place from the variables that torchrun sets; None if one of the four is not set.
        ValueError: the processes are not spread evenly over the machines."""
        names = [field.upper() for field in cls._fields]
        if any(name not in environment for name in names):
            return None
        place = cls(*(int(environment[name]) for name in names))
        if place.world_size % place.local_world_size:
            raise ValueError(
                f"LOCAL_WORLD_SIZE is {place.local_world_size}, which does not divide WORLD_SIZE, "
                f"{place.world_size}: every machine has to have the same number of processes"
            )
        return place


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--timeout``, which :func:`launch` reads."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_MINUTES,
        metavar="MINUTES",
        help="of many processes, end when one has waited so long for another (default: "
        "%(default)g); evaluating on rank 0 has to take less",
    )


def waiting_time() -> timedelta:
    """How long one process of a run waits for another: ``--timeout``."""
    return timedelta(minutes=float(os.environ.get(_TIMEOUT, TIMEOUT_MINUTES)))


def launch(main: Main, args: argparse.Namespace) -> None:
    """
    Run ``main(args)`` in every process of a run: in this one, if torchrun (or anything that sets
    its environment) has started it; in those that Detectron2 spawns, if ``args.num_gpus`` or
    ``args.num_machines`` asks for more than one; otherwise in this one alone.

    Under torchrun the processes talk through NCCL where each has a GPU, and through gloo on
    machines without one. A process that fails names its rank and its error in a line on stderr;
    Python's warnings are shown by rank 0 alone. One whose torchrun is gone stops as after SIGTERM.

    Args:
        main: called with ``args``.
        args: Detectron2's command line, and ``timeout`` in minutes.

    Raises:
        SystemExit: the options or this machine do not fit what torchrun was asked for; a spawned
            process ended with a status, which has said why, or by a signal.
    """
    os.environ[_TIMEOUT] = str(args.timeout)  # spawned processes inherit it
    place = ProcessPlace.from_environment(os.environ)
    if place is None:
        _spawn(main, args)
        return
    if problem := _problem(args, place):
        # Each process finds the same one.
        sys.exit(problem if place.local_rank == 0 else 1)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # the parent is torchrun; a script may end before us
        threading.Thread(target=_stop_without, args=(os.getppid(),), daemon=True).start()
    record(_run)(main, args, place)


def _spawn(main: Main, args: argparse.Namespace) -> None:
    """``main(args)`` in the processes that Detectron2 spawns, or in this one, if it is the only."""
    is_alone = args.num_gpus * args.num_machines == 1
    with contextlib.nullcontext() if is_alone else _signals_passed_on():
        try:
            launch_spawned(
                main if is_alone else functools.partial(_run_spawned, main),
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
                timeout=timedelta(minutes=args.timeout),
            )
        except ProcessExitedException as error:
            if error.exit_code < 0:
                print(_first_line(error), file=sys.stderr)
            status = error.exit_code if error.exit_code > 0 else 128 - error.exit_code
            raise SystemExit(status) from None


def _run_spawned(main: Main, args: argparse.Namespace) -> None:
    """``main(args)`` as one process of Detectron2's, which has to import projects again."""
    for project in getattr(args, "project", ()):
        use_project(project)
    _let_parameters_be_unused()
    main(args)


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Within the ``with``, signals go on to the child processes, and this one awaits their end."""
    received: list[int] = []
    told: set[int | None] = set()

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        told.clear()
        tell()
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)  # for a child that is just being started

    def tell(*_: Any) -> None:
        for child in multiprocessing.active_children():
            if child.pid not in told:
                told.add(child.pid)
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(child.pid or 0, received[-1])

    handlers = {**dict.fromkeys(SIGNALS, pass_on), signal.SIGALRM: tell}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if received:  # before training, torch takes SIGINT for no error
        raise SystemExit(128 + received[0])


def _stop_without(parent: int) -> None:
    """When the parent process has ended, stop this one: with a checkpoint, or else the hard way."""
    while os.getppid() == parent:
        time.sleep(_SECONDS_OF_POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_WITHOUT_PARENT)
    os.kill(os.getpid(), signal.SIGKILL)


def _problem(args: argparse.Namespace, place: ProcessPlace) -> str | None:
    """Why there can be no such run, in a line."""
    if args.num_gpus > 1 or args.num_machines > 1:
        option = "--num-gpus" if args.num_gpus > 1 else "--num-machines"
        return f"{option} is for runs without torchrun, which has --nproc-per-node and --nnodes"
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < place.local_world_size:
        return (
            f"--nproc-per-node is {place.local_world_size}, but this machine has {num_gpus} GPUs; "
            "CUDA_VISIBLE_DEVICES= (empty) puts all processes on the CPU"
        )
    max_restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if max_restarts != "0" and not (args.resume or args.eval_only):
        return (
            f"--max-restarts is {max_restarts}, but a restarted run would start again from "
            "iteration 0: add --resume"
        )
    return None


def _run(main: Main, args: argparse.Namespace, place: ProcessPlace) -> None:
    """``main(args)`` as one process of torchrun's."""
    if place.rank > 0:
        warnings.simplefilter("ignore")
    try:
        if place.world_size > 1:
            _join(place, timedelta(minutes=args.timeout))
        main(args)
        if place.world_size > 1:
            dist.destroy_process_group()
    except Exception as error:
        name = f"rank {place.rank} of {place.world_size}"
        is_of_another = _is_of_another(error)
        what = "has lost another:" if is_of_another else "failed:"
        print(f"{name} {what} {_first_line(error)}", file=sys.stderr, flush=True)
        if is_of_another:
            # It is the one to blame in torchrun's report: let torchrun see it first.
            time.sleep(_SECONDS_TO_BE_ENDED)
        raise


def _join(place: ProcessPlace, timeout: timedelta) -> None:
    """Set up the process groups: of all, and of those of each machine, as Detectron2 wants them."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(place.local_rank)
    else:
        # Detectron2 names a GPU otherwise, which DistributedDataParallel refuses for CPUs.
        defaults.create_ddp_model = functools.partial(defaults.create_ddp_model, device_ids=None)
    _let_parameters_be_unused()
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # A restarted run may find the store of the one before, with addresses of ended processes.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    # As main's comm.create_local_process_group, which Detectron2 0.6 has not.
    for first in range(0, world_size, place.local_world_size):
        ranks = range(first, first + place.local_world_size)
        group = dist.new_group(list(ranks), timeout=timeout)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()


def _let_parameters_be_unused() -> None:
    """Let DistributedDataParallel take models with outputs that nothing reads, as of some FPNs."""
    # It learns from the first step which parameters take part, and expects no others to.
    defaults.create_ddp_model = functools.partial(defaults.create_ddp_model, static_graph=True)


def _is_of_another(error: Exception) -> bool:
    """Is this the error of a collective operation, after another process ended or hung?"""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
