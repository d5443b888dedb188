"""Checkpoints that are damaged, missing, or cannot be written; which one --resume takes."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from nl_detectron.engine import NonLocalCheckpointer
from nl_detectron.engine.interruption import sole_run
from nl_detectron.files import sole_user, whole_file
from nl_detectron.weights.checkpoint_io import CheckpointError, load_checkpoint

LOGGER = "nl_detectron.engine.checkpoint"


class Counter:
    """Stands for a trainer."""

    iteration = 0

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def build(folder, width=40, **options):
    return NonLocalCheckpointer(nn.Linear(width, width), str(folder), trainer=Counter(), **options)


def save(checkpointer, iteration, name=None):
    checkpointer.checkpointables["trainer"].iteration = iteration
    nn.init.constant_(checkpointer.model.weight, iteration)
    checkpointer.save(name or f"model_{iteration:07d}", iteration=iteration)


@pytest.fixture
def run(tmp_path):
    """Checkpoints of the iterations 4, 9 and 14."""
    checkpointer = build(tmp_path)
    for iteration in (4, 9, 14):
        save(checkpointer, iteration)
    return tmp_path


def resume(folder, caplog):
    """The iteration that a run goes on from, None if it starts afresh; and what is said."""
    checkpointer = build(folder)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        logging.getLogger("nl_detectron").propagate = True
        checkpointer.resume_or_load("", resume=True)
    lines = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    iteration = checkpointer.checkpointables["trainer"].iteration
    if checkpointer.resumed:
        assert (checkpointer.model.weight == iteration).all()
        assert lines == ([checkpointer.note] if checkpointer.note else [])
        return iteration, checkpointer.note
    assert iteration == 0
    return None, checkpointer.note


def overwrite(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = bytes(byte ^ 0x55 for byte in content[middle : middle + 50])
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
    "overwritten": overwrite,
}


def test_sound_ones_are_taken_without_a_word(run, caplog):
    assert resume(run, caplog) == (14, "")


@pytest.mark.parametrize("damage", DAMAGE)
def test_newest_sound_one_instead_of_a_damaged_one(damage, run, caplog):
    DAMAGE[damage](run / "model_0000014.pth")
    iteration, note = resume(run, caplog)
    assert iteration == 9
    assert "model_0000014.pth" in note
    assert f"going on from {run / 'model_0000009.pth'}" in note
    assert "\n" not in note
    DAMAGE[damage](run / "model_0000009.pth")
    assert resume(run, caplog)[0] == 4


@pytest.mark.parametrize("content", [None, b"", b"\n", b"model_0000099.pth", b"\xff\xfe", b".."])
def test_newest_sound_one_without_last_checkpoint(content, run, caplog):
    tag = run / "last_checkpoint"
    tag.unlink()
    if content is not None:
        tag.write_bytes(content)
    iteration, note = resume(run, caplog)
    assert iteration == 14
    assert "going on from" in note


def test_newest_is_by_iteration_and_has_a_trainer(run, caplog):
    save(build(run), 3, "model_final")  # of a shorter run, before
    torch.save({"model": nn.Linear(40, 40).state_dict()}, run / "weights.pth")
    (run / "last_checkpoint").unlink()
    assert resume(run, caplog)[0] == 14


@pytest.mark.parametrize("damage", DAMAGE)
def test_starts_afresh_without_a_sound_one(damage, run, caplog):
    for path in run.glob("*.pth"):
        DAMAGE[damage](path)
    iteration, note = resume(run, caplog)
    assert iteration is None
    assert note.startswith(f"There is no checkpoint in {run} to go on from")
    assert note.endswith("training starts afresh")


def test_starts_afresh_in_an_empty_folder(tmp_path, caplog):
    iteration, note = resume(tmp_path, caplog)
    assert iteration is None
    assert "last_checkpoint is missing): training starts afresh" in note


def test_weights_alone_start_at_0(run, caplog):
    model = build(run).model
    torch.save({"model": model.state_dict()}, run / "model_0000014.pth")
    iteration, note = resume(run, caplog)
    assert iteration is None
    assert "model_0000014.pth has weights alone" in note


def test_damaged_weights_are_refused_everywhere(run):
    overwrite(run / "model_0000014.pth")
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_checkpoint(run / "model_0000014.pth")


def test_other_tools_load_what_is_saved(run):
    assert torch.load(run / "model_0000014.pth")["trainer"] == {"iteration": 14}
    assert (run / "last_checkpoint").read_text() == "model_0000014.pth"


@pytest.mark.parametrize(("keep", "kept"), [(0, [4, 9, 14, 19]), (1, [19]), (2, [14, 19])])
def test_keeps_the_last(keep, kept, tmp_path):
    for start in (4, 14):  # the second as after resuming
        checkpointer = build(tmp_path, keep_last=keep)
        for iteration in (start, start + 5):
            save(checkpointer, iteration)
    save(checkpointer, 19, "model_final")
    names = {f"model_{iteration:07d}.pth" for iteration in kept} | {"model_final.pth"}
    assert {path.name for path in tmp_path.glob("*.pth")} == names


def test_keeps_the_last_by_iteration(run):
    os.utime(run / "model_0000004.pth", (2**33, 2**33))  # of a clock that was wrong
    torch.save({}, run / "model_0000099.pth")  # of another run, before this one
    for iteration in (19, 24):
        save(build(run, keep_last=2), iteration)
    names = {f"model_{iteration:07d}.pth" for iteration in (19, 24, 99)}
    assert {path.name for path in run.glob("*.pth")} == names


@pytest.fixture
def small_disk(tmp_path):
    """A folder where 1 MiB is left, or where no file can be larger, if mounting is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if (
        shutil.which("mount")
        and not subprocess.run(command, capture_output=True, timeout=60).returncode
    ):
        yield tmp_path
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=60)
        return
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_costs_nothing_that_was_there(small_disk, caplog):
    save(build(small_disk), 4)
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    with pytest.raises((OSError, RuntimeError)):
        save(build(small_disk, width=1000), 9)
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before
    assert resume(small_disk, caplog) == (4, "")


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail():
        with whole_file(path) as draft:
            draft.write_text("half")
            assert path.read_text() == "before"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def hold(folder, pipe):
    """Run in a folder, in a child that has a child that outlives it, as a loader's worker does."""
    holder = os.fork()
    if holder:
        return holder
    os.setsid()
    with sole_run(str(folder)):
        if not os.fork():
            time.sleep(60)
            os._exit(0)
        os.write(pipe, b"holds")
        time.sleep(60)
    os._exit(0)


def test_second_run_in_a_folder_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "output"
    reader, writer = os.pipe()
    holder = hold(folder, writer)
    assert os.read(reader, 5) == b"holds"
    (folder / ".model_final.pth.0123.draft").write_bytes(b"half")
    with pytest.raises(ValueError, match=f"^{folder} is where another run is running now$"):
        sole_run(str(folder), patience=0.2).__enter__()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with sole_run(str(folder)):  # though its child lives on
        assert not list(folder.glob("*.draft"))
    os.killpg(holder, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="holds names without files")
def test_second_run_in_a_folder_that_was_made_anew_is_refused(tmp_path):
    folder = tmp_path / "output"
    reader, writer = os.pipe()
    holder = hold(folder, writer)
    assert os.read(reader, 5) == b"holds"
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="is where another run is running now"):
        sole_run(str(folder)).__enter__()
    with sole_run(str(tmp_path / "another")):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with sole_run(str(folder)):
        pass
    os.killpg(holder, signal.SIGKILL)


def test_a_folder_has_one_user_at_a_time(tmp_path):
    with (
        sole_user(tmp_path, "study"),
        pytest.raises(ValueError, match=r"another study"),
        sole_user(tmp_path, "study"),
    ):
        pass
    with sole_user(tmp_path, "study"):  # it is free again
        pass
