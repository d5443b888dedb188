"""Runs that are told to stop, and runs that must not start."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm

from nl_detectron.files import make_folder, remove_drafts, sole_user

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(SystemExit):
    """A signal ended the run; the process ends with 128 and the signal's number, as in a shell."""

    def __init__(self, number: int) -> None:
        """
        Args:
            number: of the signal.
        """
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Interruption(HookBase):
    """
    SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (what SLURM sends before the time is up, if it is told to)
    end a run after the step with a checkpoint and with status 143, 130 or 138; an evaluation is
    not waited for, as resuming does it again. A second signal ends the process at once.

    With many ranks, one of which may have got a signal alone, a small all-reduce (gloo) that runs
    beside each step tells all of them after which iteration to stop: at most one later.

    It belongs behind the hooks that change any state, right before :class:`ExactResume`.
    """

    def __init__(self, checkpointer: DetectionCheckpointer) -> None:
        """
        Args:
            checkpointer: saves the run.
        """
        self._checkpointer = checkpointer
        self._process = 0
        self._received = 0
        self._between_steps = True
        self._finished: int | None = None
        self._group: Any = None
        self._reduction: tuple[Any, torch.Tensor] | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """
        Within the ``with``, which is around ``train``, the signals end the run as the class says.

        Raises:
            Interrupted: at the end of the ``with``, if one came.
        """
        if threading.current_thread() is not threading.main_thread():  # others get no signals
            yield
            return
        self._process = os.getpid()
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        except BaseException as error:
            # A signal to the whole group may end a loader's worker, and so the step, before us.
            if not self._received:
                raise
            interrupted = Interrupted(self._received)
            done = "before the first" if self._finished is None else f"after {self._finished}"
            if self._finished not in (None, self._checkpointer.saved_iteration):
                done += f", which could not be saved ({' '.join(str(error).split())})"
            logger.warning(
                f"Stopped by {interrupted.signal.name}, iteration: {done}. The same command with "
                f"--resume goes on ({self._checkpointer.get_checkpoint_file() or 'from the start'})"
            )
            raise interrupted from (None if isinstance(error, Interrupted) else error)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def before_train(self) -> None:
        if comm.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def before_step(self) -> None:
        self._between_steps = False

    def after_step(self) -> None:
        self._finished = self.trainer.iter
        self._between_steps = self._group is None
        number = self._received if self._group is None else self._agreed()
        self._between_steps = True
        if number:
            self._save(number)
            if self._group is not None:  # torchrun ends the others as soon as one has ended
                dist.barrier(self._group)
            raise Interrupted(number)

    def after_train(self) -> None:
        # Or an EvalHook would take a signal, or an error, in the last iteration for the end of
        # training, and one process would wait there for all others, and they for it.
        if self._received or self.trainer.iter < self.trainer.max_iter:
            self.trainer.max_iter = math.inf

    def _agreed(self) -> int:
        """The highest signal that any rank had got before the last step; 0 is none."""
        number = 0
        if self._reduction is not None:
            work, flag = self._reduction
            work.wait()
            number = int(flag)
        if not number:
            flag = torch.tensor(self._received)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._reduction = work, flag
        return number

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker of an evaluation, say, which inherits this
            signal.signal(number, signal.SIG_DFL)
            return
        if self._received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = number
        if self._between_steps:
            self._save(number)
            raise Interrupted(number)

    def _save(self, number: int) -> None:
        """
        Save the iteration that was finished last, if that is not done yet, in order to end.

        Nothing else may change: where Python ignores errors (logging's work around a fork, say), it
        ignores ``Interrupted``, too, and the run ends one step later.
        """
        self._received = number
        with contextlib.suppress(ValueError):  # in a thread, which has no handlers
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises when a worker ends
        iteration = self._finished
        if iteration is not None and iteration != self._checkpointer.saved_iteration:
            counted = self.trainer.iter
            self.trainer.iter = iteration  # the next one may have been counted
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            self.trainer.iter = counted


@contextlib.contextmanager
def sole_run(output_dir: str) -> Iterator[None]:
    """
    Within the ``with``, no other run may be in ``output_dir``, which is made if need be; what
    killed runs left half-written there is removed. All ranks enter it together.

    Args:
        output_dir: the folder of the run.

    Raises:
        ValueError: another run is there, or no file can be written.
        SystemExit: the same, on all ranks but the first.
    """
    problem = ""
    with contextlib.ExitStack() as stack:
        if comm.is_main_process():
            try:
                folder = make_folder("OUTPUT_DIR", output_dir)
                stack.enter_context(sole_user(folder, "run"))
                remove_drafts(folder)
            except ValueError as error:
                problem = str(error)
        if problem := comm.all_gather(problem)[0]:
            raise ValueError(problem) if comm.is_main_process() else SystemExit(2)
        yield
