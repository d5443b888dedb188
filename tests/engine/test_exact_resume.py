"""A resumed run against one that was never stopped: its metrics, its checkpoints, its draws."""

import json
import logging
import os
import signal
import types

import pytest
import torch
from detectron2.engine import TrainerBase, hooks
from detectron2.utils.events import JSONWriter
from torch import nn

from nl_detectron.data import TrainLoader
from nl_detectron.engine import ExactResume, Interruption, NonLocalCheckpointer, exact_resume
from nl_detectron.engine.interruption import Interrupted

ITERATIONS = 60


class WritingTrainer(TrainerBase):
    """Writes what it draws each 4 iterations, smoothed; evaluates each 6; ends where it is told."""

    def __init__(self, folder, killed_at=None, save_period=5):
        super().__init__()
        self.killed_at = killed_at
        self.model = nn.Linear(1, 1)
        self.data_loader = TrainLoader([{}], mapper=dict, total_batch_size=1)
        self.checkpointer = NonLocalCheckpointer(self.model, str(folder), trainer=self)
        self.interruption = Interruption(self.checkpointer)
        self.exact_resume = ExactResume(self.checkpointer, 1, config={"key": 1})
        self.register_hooks(
            [
                hooks.PeriodicCheckpointer(self.checkpointer, save_period),
                self.interruption,
                self.exact_resume,
                hooks.EvalHook(6, lambda: {"AP": self.iter}),
                hooks.PeriodicWriter([JSONWriter(str(folder / "metrics.json"))], period=4),
            ]
        )

    def run_step(self):
        if self.iter == self.killed_at:
            raise KeyboardInterrupt
        self.storage.put_scalar("drawn", torch.rand(()).item())

    def run(self, resume=False, iterations=ITERATIONS):
        self.checkpointer.resume_or_load("", resume=resume)
        with self.interruption.watch():
            self.train(self.iter + 1 if self.checkpointer.resumed else 0, iterations)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The lines of ``metrics.json`` of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    WritingTrainer(folder).run()
    return (folder / "metrics.json").read_bytes().splitlines(keepends=True)


@pytest.fixture
def killed(tmp_path):
    """A run that was killed in iteration 43, and saved after 39, before the line of 39."""
    with pytest.raises(KeyboardInterrupt):
        WritingTrainer(tmp_path, killed_at=43).run()
    return tmp_path


def resume(folder, caplog, **options):
    """Go on to the end; the lines of ``metrics.json`` then, and the warnings."""
    caplog.clear()
    logging.getLogger("nl_detectron").propagate = True
    WritingTrainer(folder).run(resume=True, **options)
    lines = (folder / "metrics.json").read_bytes().splitlines(keepends=True)
    warnings = {id(r): r.getMessage() for r in caplog.records if r.levelname == "WARNING"}
    return lines, list(warnings.values())


def test_metrics_are_those_of_a_run_that_was_never_stopped(whole, killed, caplog):
    assert len({json.loads(line)["iteration"] for line in whole}) > 20
    assert resume(killed, caplog) == (whole, [])


def test_metrics_in_a_folder_that_has_some_already(whole, killed, caplog):
    """A second run adds to the file of the first; resumed, it leaves the first's lines alone."""
    first = (killed / "metrics.json").read_bytes().splitlines(keepends=True)
    with pytest.raises(KeyboardInterrupt):
        WritingTrainer(killed, killed_at=13).run()
    assert resume(killed, caplog) == ([*first, *whole], [])


def bad_byte(lines):
    return [*lines[:3], lines[3][:9] + b"\xff" + lines[3][10:], *lines[4:]]


DAMAGE = {  # what becomes of the lines; which of those of the checkpoint are lost; what is said
    "bad byte": (bad_byte, [3], "line 4 is left out, as no metrics can be read there"),
    "zeros": (lambda ls: [*ls[:3], b"\0" * 50 + b"\n", *ls[4:]], [3], "line 4 is left out"),
    "zeros at the end": (lambda ls: [*ls, b"\0" * 500], [], "is left out"),
    "foreign line in front": (lambda ls: [b"hello\n" * 9, *ls], [], "line 1 and 8 more are left"),
    "foreign line in it": (lambda ls: [*ls[:2], b'{"a": 1}\n', *ls[2:]], [], "line 3 is left out"),
    "foreign line behind": (lambda ls: [*ls, b"[]\n"], [], "is left out"),
    "nested line": (lambda ls: [b"[" * 10**5 + b"\n", *ls], [], "line 1 is left out"),
    "cut": (lambda ls: [*ls[:4], ls[4][:-5]], range(4, 99), "line 5 is left out"),
    "cut between lines": (lambda ls: ls[:4], range(4, 99), "the lines up to iteration 35 are gone"),
    "empty": (lambda ls: [], range(99), "the lines up to iteration 35 are gone"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metrics_keep_their_sound_lines(damage, whole, killed, caplog):
    change, lost, said = DAMAGE[damage]
    file = killed / "metrics.json"
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))
    lines, warnings = resume(killed, caplog)
    at_checkpoint = sum(json.loads(line)["iteration"] <= 35 for line in whole)
    lost = [i for i in lost if i < at_checkpoint]
    assert lines == [line for i, line in enumerate(whole) if i not in lost]
    (warning,) = warnings
    assert warning.startswith(f"{file} is damaged: ")
    assert said in warning
    assert "\n" not in warning


def test_metrics_of_a_lost_run_are_kept(killed, caplog):
    before = (killed / "metrics.json").read_bytes()
    for checkpoint in killed.glob("*.pth"):
        checkpoint.unlink()
    lines, (note,) = resume(killed, caplog, iterations=9)
    assert note.endswith("training starts afresh")
    assert (killed / "metrics.old.json").read_bytes() == before
    assert [json.loads(line)["iteration"] for line in lines][:2] == [3, 7]


def test_what_must_outlive_a_power_cut_is_synced(killed, caplog, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split(".")[0:2])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    trainer = WritingTrainer(killed)
    trainer.run(iterations=1)
    folder = [killed.name]
    synced[:] = synced[:4]
    assert synced == [["", "model_final"], folder, ["", "last_checkpoint"], folder]
    synced.clear()
    trainer.exact_resume._metrics.go_back(size=9, written=-1)
    assert synced == [["metrics", "json"]]
    trainer.exact_resume._metrics.set_aside()
    assert synced[1:] == [["", "metrics"], folder, ["metrics", "json"]]


@pytest.mark.parametrize("save_period", [5, 7])
def test_final_checkpoint_of_a_run_that_was_killed_before_it(save_period, tmp_path, caplog):
    (tmp_path / "whole").mkdir()
    WritingTrainer(tmp_path / "whole").run()

    def killed(name, **kwargs):
        if name == "model_final":
            raise KeyboardInterrupt
        NonLocalCheckpointer.save(trainer.checkpointer, name, **kwargs)

    trainer = WritingTrainer(tmp_path, save_period=save_period)
    trainer.checkpointer.save = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    final = tmp_path / "model_final.pth"
    resume(tmp_path, caplog)
    expected, actual = (torch.load(f / final.name) for f in (tmp_path / "whole", tmp_path))
    for checkpoint in (expected, actual):
        del checkpoint["model"]
    assert actual == expected
    written = final.stat().st_mtime_ns
    resume(tmp_path, caplog)
    assert final.stat().st_mtime_ns == written


def test_fewer_iterations_than_are_done_are_said(killed, caplog):
    _, warnings = resume(killed, caplog, iterations=30)
    assert any(
        "is of iteration 39, but the schedule (SOLVER.MAX_ITER) has 30" in w for w in warnings
    )
    assert not (killed / "model_final.pth").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("disk\nfull")]
)
def test_a_full_disk_is_said_where_a_signal_ends_the_run(error, killed, caplog, monkeypatch):
    def full(checkpointer, name, **kwargs):
        raise error

    trainer = WritingTrainer(killed)
    step = trainer.run_step
    trainer.run_step = lambda: (step(), os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(NonLocalCheckpointer, "save", full)
    logging.getLogger("nl_detectron").propagate = True
    with pytest.raises(Interrupted):
        trainer.run(resume=True)
    (line,) = {r.getMessage() for r in caplog.records if "Stopped" in r.getMessage()}
    assert f"after 40, which could not be saved ({' '.join(str(error).split())})" in line
    assert line.endswith("goes on (" + str(killed / "model_0000039.pth") + ")")


def test_each_rank_draws_of_its_own(tmp_path, monkeypatch):
    drawn = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(exact_resume.comm, "get_rank", lambda rank=rank: rank)
        trainer = WritingTrainer(tmp_path)
        trainer.run(iterations=1)
        drawn.append(trainer.storage.history("drawn").latest())
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize(
    ("period", "iteration", "start"), [(4, 3, 0), (4, 7, 2), (4, 59, 28), (0, 59, 0), (7, 59, 16)]
)
def test_precise_bn_has_the_batches_of_its_update(period, iteration, start, tmp_path):
    """Two a time; 59 is the last iteration."""
    ids = [{"id": i} for i in range(50)]
    loader, other = (TrainLoader(ids, mapper=dict, total_batch_size=2) for _ in range(2))
    run = ExactResume(NonLocalCheckpointer(nn.Linear(1, 1), str(tmp_path)), seed=9)
    run.trainer = types.SimpleNamespace(iter=iteration)
    other.seed, other.start_iteration = 9, start
    assert next(iter(run.batches_of_precise_bn(loader, period, 2))) == next(iter(other))
