"""Runs that are told to stop, and runs that must not start."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm

from nl_detectron.engine.launch import SECONDS_WITHOUT_PARENT, SIGNALS, waiting_time
from nl_detectron.files import is_used, make_folder, remove_drafts, sole_user

logger = logging.getLogger(__name__)

_SECONDS_TO_PASS_ON = 2.0
_SECONDS_TO_NEXT_STEP = 3.0  # far more than lies between two steps, less an evaluation


class Interrupted(SystemExit):
    """A signal ended the run; the process ends with 128 and the signal's number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Interruption(HookBase):
    """Lets signals end a run so that it can be resumed.

    SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (what SLURM sends before the time is up, if it is told to)
    end a run after the step with a checkpoint and with status 143, 130 or 138; an evaluation is not
    waited for, as resuming does it again. A second signal ends the process at once.

    With many ranks, one of which may have got a signal alone, a small all-reduce (gloo) that runs
    beside each step tells all of them after which iteration to stop: at most one later. There a
    signal soon after the first is taken for the same: a scheduler sends it to all processes, and
    torchrun passes it on.

    It belongs behind the hooks that change any state, right before :class:`ExactResume`."""

    def __init__(self, checkpointer: DetectionCheckpointer) -> None:
        self._checkpointer = checkpointer
        self._process = 0
        self._received = 0
        self._since = 0.0
        self._between_steps = True
        self._finished: int | None = None
        self._group: Any = None
        self._reduction: tuple[Any, torch.Tensor] | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Within the ``with``, which is around ``train``, let signals end the run: Interrupted."""
        if comm.get_world_size() > 1:
            # No handler runs in the calls that meet the other ranks, so a signal ends these as
            # ever. Only the first notices at once if another rank has ended.
            comm.synchronize()
            self._group = dist.new_group(backend="gloo", timeout=waiting_time())
        if threading.current_thread() is not threading.main_thread():  # others get no signals
            yield
            return
        self._process = os.getpid()
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._stop_between_steps)
        try:
            yield
        except BaseException as error:
            # A signal to the whole group may end an evaluation's worker before us, and so the step.
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
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def before_step(self) -> None:
        self._between_steps = False

    def after_step(self) -> None:
        self._finished = self.trainer.iter
        self._between_steps = self._group is None
        number = self._received if self._group is None else self._agreed()
        if number:
            self._save(number)
            if self._group is not None:  # torchrun ends the others as soon as one has ended
                dist.barrier(self._group)
            raise Interrupted(number)
        self._between_steps = True
        if self._received:
            self._stop_soon()

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
            if self._group is None or time.monotonic() - self._since > _SECONDS_TO_PASS_ON:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._note(number)
        if self._between_steps:
            self._stop_soon()

    def _stop_soon(self) -> None:
        """Stop between steps; of many ranks, which stop after a step, only if that is late."""
        if self._group is None:
            self._stop_between_steps()
        else:
            signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_NEXT_STEP)

    def _stop_between_steps(self, *_: Any) -> None:
        if self._between_steps:  # in an evaluation, say
            self._save(self._received)
            raise Interrupted(self._received)

    def _note(self, number: int) -> None:
        if not self._received:
            self._received, self._since = number, time.monotonic()

    def _save(self, number: int) -> None:
        """Save the iteration that was finished last, if that is not done yet, in order to end.

        Nothing else may change: where Python ignores errors (logging's work around a fork, say), it
        ignores ``Interrupted``, too, and the run ends one step later."""
        self._note(number)
        with contextlib.suppress(ValueError):  # in a thread, which has no handlers
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises when a worker ends
        iteration = self._finished
        if iteration is not None and iteration != self._checkpointer.saved_iteration:
            counted = self.trainer.iter
            self.trainer.iter = iteration  # the next one may have been counted
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            self.trainer.iter = counted


@contextlib.contextmanager
def sole_run(output_dir: str, patience: float = SECONDS_WITHOUT_PARENT + 5) -> Iterator[None]:
    """Keep other runs out of ``output_dir`` within the ``with``. The folder is made if need be;
    what killed runs left half-written there is removed. All ranks enter it together. ValueError (on
    all ranks but the first, SystemExit): no file can be written there, or another run is there and
    does not end within ``patience`` seconds, as one does whose torchrun was killed."""
    problem = ""
    with contextlib.ExitStack() as stack:
        if comm.is_main_process():
            try:
                folder = make_folder("OUTPUT_DIR", output_dir)
                deadline = time.monotonic() + patience
                while is_used(folder) and time.monotonic() < deadline:
                    time.sleep(0.1)
                stack.enter_context(sole_user(folder, "run"))
                remove_drafts(folder)
            except ValueError as error:
                problem = str(error)
        if problem := comm.all_gather(problem)[0]:
            raise ValueError(problem) if comm.is_main_process() else SystemExit(2)
        yield
