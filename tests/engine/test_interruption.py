import argparse
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import TrainerBase, hooks
from detectron2.utils import comm
from torch import nn

from nl_detectron.data import TrainLoader
from nl_detectron.engine import ExactResume, Interruption, NonLocalCheckpointer
from nl_detectron.engine.interruption import Interrupted, sole_run
from tests.engine.processes import end_of, run_processes

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 12
STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


class DrawingTrainer(TrainerBase):
    """Adds what it draws to its weight; gets a signal in a step or in an evaluation."""

    def __init__(self, folder, seed=1, number=signal.SIGTERM, **moments):
        super().__init__()
        self.signal = number
        moments = {"before": None, "in_step": None, "in_evaluation": None, **moments}
        self.before, self.in_step, self.in_evaluation = moments.values()
        self.model = nn.Linear(1, 1)
        self.data_loader = TrainLoader(
            [{"id": i} for i in range(5)],
            mapper=lambda record: record["id"] + random.random(),
            total_batch_size=2,
        )
        self.batches = iter(self.data_loader)
        self.evaluated = []
        nn.init.zeros_(self.model.weight)
        self.checkpointer = NonLocalCheckpointer(self.model, str(folder), trainer=self)
        self.exact_resume = ExactResume(self.checkpointer, seed)
        self.interruption = Interruption(self.checkpointer)
        self.register_hooks(
            [
                hooks.PeriodicCheckpointer(self.checkpointer, 5),
                self.interruption,
                self.exact_resume,
                hooks.EvalHook(4, self.evaluate),
            ]
        )

    def before_step(self):
        if self.iter == self.before:  # no hook knows yet that a step begins
            os.kill(os.getpid(), self.signal)
        super().before_step()

    def run_step(self):
        drawn = [*next(self.batches), torch.rand(()).item(), np.random.rand(), random.random()]
        with torch.no_grad():
            self.model.weight += sum(drawn)
        self.storage.put_scalar("drawn", sum(drawn))
        if self.iter == self.in_step:
            os.kill(os.getpid(), self.signal)

    def evaluate(self):
        if self.iter == self.in_evaluation:
            os.kill(os.getpid(), self.signal)
        self.evaluated.append(self.iter)
        return {}

    def run(self, resume=False):
        self.checkpointer.resume_or_load("", resume=resume)
        with self.interruption.watch():
            self.train(self.iter + 1 if self.checkpointer.resumed else 0, ITERATIONS)
        history = self.storage.history("drawn").values() if self.storage.histories() else []
        return self.model.weight.item(), history


@pytest.mark.parametrize(("number", "status"), STOPPED.items())
@pytest.mark.parametrize("iteration", [0, 3, 4, ITERATIONS - 1])
def test_stops_after_the_step_with_a_checkpoint(number, status, iteration, tmp_path):
    (tmp_path / "whole").mkdir()
    expected = DrawingTrainer(tmp_path / "whole").run()
    before = signal.getsignal(number)
    stopped = DrawingTrainer(tmp_path, number=number, in_step=iteration)
    with pytest.raises(SystemExit) as end:
        stopped.run()
    assert end.value.code == status
    assert signal.getsignal(number) == before
    assert stopped.iter == iteration
    assert iteration not in stopped.evaluated
    resumed = DrawingTrainer(tmp_path)
    assert resumed.run(resume=True) == expected
    # What the stopped run did not wait for, then the rest.
    due = [i for i in (3, 7, ITERATIONS) if i >= iteration] if iteration < 11 else [ITERATIONS]
    assert resumed.evaluated == due
    assert resumed.start_iter == iteration + 1


@pytest.mark.parametrize("iteration", [3, 7, ITERATIONS])
def test_does_not_wait_for_an_evaluation(iteration, tmp_path):
    stopped = DrawingTrainer(tmp_path, in_evaluation=iteration)
    with pytest.raises(Interrupted):
        stopped.run()
    assert iteration not in stopped.evaluated
    resumed = DrawingTrainer(tmp_path)
    resumed.run(resume=True)
    assert resumed.evaluated[0] == iteration
    assert resumed.start_iter == min(iteration + 1, ITERATIONS)


@pytest.mark.parametrize("iteration", [0, 1, 5, 9])
def test_stops_between_steps(iteration, tmp_path):
    (tmp_path / "whole").mkdir()
    expected = DrawingTrainer(tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        DrawingTrainer(tmp_path, before=iteration).run()
    resumed = DrawingTrainer(tmp_path)
    assert resumed.run(resume=True) == expected
    assert resumed.start_iter == iteration


@pytest.mark.parametrize("iteration", [3, 7])
def test_stops_a_step_later_where_errors_are_ignored(iteration, tmp_path):
    class Ignoring(DrawingTrainer):
        def evaluate(self):
            with contextlib.suppress(SystemExit):
                return super().evaluate()

    (tmp_path / "whole").mkdir()
    expected = DrawingTrainer(tmp_path / "whole").run()
    stopped, ends = Ignoring(tmp_path, in_evaluation=iteration), []
    # What hooks such as PreciseBN take for the end of training.
    stopped.register_hooks([hooks.CallbackHook(after_step=lambda t: ends.append(t.max_iter))])
    stopped._hooks.insert(0, stopped._hooks.pop())
    with pytest.raises(Interrupted):
        stopped.run()
    assert ends == [ITERATIONS] * (iteration + 2)
    resumed = DrawingTrainer(tmp_path)
    assert resumed.run(resume=True) == expected
    assert resumed.start_iter == iteration + 2


def test_says_how_to_go_on(tmp_path, caplog):
    logging.getLogger("nl_detectron").propagate = True
    with pytest.raises(Interrupted):
        DrawingTrainer(tmp_path, in_step=6).run()
    # A record may reach the capture by its logger and by the root.
    records = {id(r): r.getMessage() for r in caplog.records if "Stopped" in r.getMessage()}
    (line,) = records.values()
    assert line == (
        "Stopped by SIGTERM, iteration: after 6. The same command with --resume goes on "
        f"({tmp_path / 'model_0000006.pth'})"
    )


def test_drawn_seed_is_kept(tmp_path):
    first = DrawingTrainer(tmp_path, seed=-1, in_step=6)
    with pytest.raises(Interrupted):
        first.run()
    other, resumed = DrawingTrainer(tmp_path, seed=-1), DrawingTrainer(tmp_path, seed=-1)
    assert other.exact_resume.seed != first.exact_resume.seed
    resumed.run(resume=True)
    assert resumed.exact_resume.seed == resumed.data_loader.seed == first.exact_resume.seed


@pytest.mark.parametrize("number", STOPPED)
def test_second_signal_ends_at_once(number, tmp_path):
    interruption = DrawingTrainer(tmp_path).interruption
    child = os.fork()
    if not child:
        interruption.before_step()
        with interruption.watch():
            os.kill(os.getpid(), number)
            (tmp_path / "goes on").touch()
            os.kill(os.getpid(), number)
            os._exit(0)  # not reached
    assert end_of(child) == -number
    assert (tmp_path / "goes on").exists()


def test_a_forked_process_is_not_the_run(tmp_path):
    """A worker inherits the handlers, but writes no checkpoint; its second signal ends it."""
    interruption = DrawingTrainer(tmp_path).interruption
    with interruption.watch():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "goes on").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)  # not reached
        assert end_of(child) == -signal.SIGTERM
    assert (tmp_path / "goes on").exists()


def stop_one_rank(args):
    """The rank that gets a signal twice, as torchrun passes it on, has nothing to save."""
    rank, saved = comm.get_rank(), []
    trainer = DrawingTrainer(args.folder, in_step=3 if rank else None)
    trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: again(t) if rank else None)])
    trainer._hooks.insert(0, trainer._hooks.pop())
    save = trainer.checkpointer.save

    def save_slowly(*name, **values):
        time.sleep(0 if rank else 1)
        save(*name, **values)
        saved.append(time.monotonic())

    trainer.checkpointer.save = save_slowly
    try:
        trainer.run()
    except Interrupted as end:
        return trainer.iter, end.code, saved[-1], time.monotonic()


def again(trainer):
    if trainer.iter == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def test_ranks_stop_together_when_the_checkpoint_is_written(tmp_path):
    args = argparse.Namespace(folder=tmp_path, timeout=1.0, resume=False, eval_only=False)
    args.num_gpus = args.num_machines = 1
    first, second = run_processes(2, stop_one_rank, args)
    assert first[:2] == second[:2]
    assert first[1] == 143
    assert first[0] in (3, 4)
    assert (tmp_path / f"model_{first[0]:07d}.pth").exists()
    assert second[3] >= first[2]  # torchrun would end the first as soon as the second has ended


def stop_between_steps(args):
    trainer = DrawingTrainer(args.folder, before=4 if comm.get_rank() else None)
    try:
        trainer.run()
    except Interrupted as end:
        return trainer.iter, end.code


def test_one_rank_that_is_told_between_steps_stops_all(tmp_path):
    args = argparse.Namespace(folder=tmp_path, timeout=1.0, resume=False, eval_only=False)
    args.num_gpus = args.num_machines = 1
    first, second = run_processes(2, stop_between_steps, args)
    assert first == second
    assert first[1] == 143
    assert (tmp_path / f"model_{first[0]:07d}.pth").exists()


def test_a_run_awaits_the_end_of_the_one_before(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with sole_run(str(tmp_path)):
            os.write(writer, b"holds")
            time.sleep(1)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 5) == b"holds"
    with sole_run(str(tmp_path)):
        pass
    assert end_of(child) == 0


@pytest.mark.slow
def test_killed_runs_end_as_if_they_were_not():
    """The short form of tests/kills.py."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "kills.py"), "--kills", "2"]
    command += ["--workers", "2"]  # one process, then two
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 resumed runs are identical" in done.stdout
