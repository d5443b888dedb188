import json
import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
import torch

from lab.study import runner
from lab.study.runner import default_workers, prepare_runs, read_result, run_all


def environments(study):
    """OMP_NUM_THREADS and CUDA_VISIBLE_DEVICES of each start."""
    return [json.loads(line)[1:] for lines in study.starts().values() for line in lines]


def test_runs_what_is_not_finished_and_keeps_the_last_aps(study):
    assert prepare_runs(study.runs) == study.runs
    run_all(study.runs[:1], study.train, workers=1)
    assert prepare_runs(study.runs) == study.runs[1:]
    assert run_all(study.runs[1:], study.train, workers=2) == []
    for run in study.runs:
        result = read_result(run)
        assert result.pop("seconds") > 0
        assert result == {"bbox/AP": 59.0 + run.seed, "bbox/AP50": 118.0 + 2 * run.seed}


def test_the_bar_counts_iterations(study, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_WATCH_SECONDS", 0.01)
    prepare_runs(study.runs)
    for run, text in zip(study.runs, ('{"iteration": 9}\n{"iterat', "", "no such thing", None)):
        if text is not None:
            (run.folder / "metrics.json").write_text(text)
    assert runner._iterations_done(study.runs) == 10
    run_all(study.runs, study.train, workers=2)
    assert runner._iterations_done(study.runs) == 4 * 20
    assert f"80/{4 * study.runs[0].iterations} [" in capsys.readouterr().err


def test_a_failure_does_not_stop_the_others(study, capsys):
    study.behave("fail-nl")
    prepare_runs(study.runs)
    failed = run_all(study.runs, study.train, workers=1)
    assert Counter(run.setting for run in failed) == {"nl": 2}
    assert prepare_runs(study.runs) == failed
    output = capsys.readouterr().out
    log = failed[0].folder / "run.log"
    assert f"nl, seed 1: FAILED, exit status 1; see {log}\n    CUDA out of memory\n" in output
    assert "baseline, seed 2: bbox/AP 61.0 (" in output
    assert log.read_text() == "CUDA out of memory\n"


def test_training_without_evaluation_is_a_failure(study, capsys):
    study.behave("no-ap")
    prepare_runs(study.runs)
    for train in (study.train, ["true"]):
        assert run_all(study.runs[:1], train, workers=1) == study.runs[:1]
    assert capsys.readouterr().out.count("no AP in its metrics.json") == 2


def test_other_settings_in_the_same_folder_are_refused(study):
    prepare_runs(study.runs)
    config = study.runs[2].folder / "run.yaml"
    config.write_text("another")
    with pytest.raises(ValueError, match=rf"other settings \({config}\)"):
        prepare_runs(study.runs)
    assert config.read_text() == "another"


@pytest.mark.parametrize(
    ("workers", "variables", "threads"),
    [(1, {}, "6"), (2, {}, "3"), (4, {}, "1"), (9, {}, "1"), (1, {"OMP_NUM_THREADS": "7"}, "7")],
)
def test_workers_share_the_cores(study, monkeypatch, workers, variables, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    prepare_runs(study.runs)
    run_all(study.runs[:2], study.train, workers)
    assert {threads_ for threads_, _ in environments(study)} == {threads}


@pytest.mark.parametrize(
    ("count", "per_run", "visible", "devices"),
    [
        (2, 1, None, {"0", "1"}),
        (2, 1, "3,5", {"3", "5"}),
        (4, 2, None, {"0,1", "2,3"}),
    ],
)
def test_each_worker_has_gpus(study, monkeypatch, count, per_run, visible, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    prepare_runs(study.runs)
    assert default_workers(per_run) == 2
    run_all(study.runs, study.train, 2, per_run)
    assert {device for _, device in environments(study)} == devices


def run_until_interrupted(study):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    run_all(study.runs[::2], study.train, workers=2)


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_children(study, signal_):
    study.behave("hang")
    prepare_runs(study.runs)
    parent = multiprocessing.get_context("fork").Process(target=run_until_interrupted, args=[study])
    parent.start()
    deadline = time.monotonic() + 120
    while len(study.starts()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(parent.pid, signal_)
    parent.join(20)
    assert parent.exitcode == 1
    pids = [json.loads(line)[0] for lines in study.starts().values() for line in lines]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert all(read_result(run) is None for run in study.runs)
