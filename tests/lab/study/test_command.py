import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lab.study import __main__ as study
from nl_detectron.data.toy import make_long_range
from tests.commands import error_of

ROOT = Path(__file__).resolve().parents[3]
TINY = {
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": [],
    "SOLVER.IMS_PER_BATCH": 2,
    "TEST.EVAL_PERIOD": 0,
}


@pytest.fixture
def plan(tmp_path):
    """The path of a plan of one tiny run."""
    path = tmp_path / "tiny.yaml"
    content = {
        "config": str(ROOT / "configs" / "long_range.yaml"),
        "seeds": [1],
        "settings": {"nl": TINY},
        "groups": {"All": ["nl"]},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_trains_and_reports(plan, tmp_path, monkeypatch, capsys):
    data = tmp_path / "cache" / "nl_detectron" / "long_range-v1" / "far"
    make_long_range(data, "far", num_train=4, num_val=2)
    command = [sys.executable, ROOT / "tools" / "study.py", plan]
    environment = {**os.environ, "FVCORE_CACHE": str(tmp_path / "cache")}
    options = {"cwd": tmp_path, "env": environment, "timeout": 300}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    assert "1 runs, 0 of them finished" in done.stdout
    result = json.loads((tmp_path / "output/studies/tiny/nl/seed_1/result.json").read_text())
    aps = {f"{task}/{ap}" for task in ("bbox", "segm") for ap in ("AP", "AP50", "AP75")}
    assert result.keys() == aps | {"seconds"}
    assert (tmp_path / "output/studies/tiny/report.md").read_text() in done.stdout
    monkeypatch.chdir(tmp_path)
    assert study.main([str(plan)]) == 0
    assert "1 runs, 1 of them finished" in capsys.readouterr().out


def test_failed_runs_are_named(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "TRAIN", ["false"])
    assert study.main([str(plan), "--output", str(tmp_path / "out"), "--workers", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.endswith("1 runs failed: nl, seed 1\n")
    assert "0 of 1 runs are finished" in captured.out


def test_plans_are_found_where_they_were(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(["studies/quick.yaml", "--status"]) == 0
    assert "waiting" in capsys.readouterr().out
    assert "none.yaml" in error_of(capsys, study.main, "studies/none.yaml")


def test_report_only_trains_nothing(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TRAIN", ["false"])
    assert study.main([str(plan), "--output", str(tmp_path / "out"), "--report-only"]) == 0


def test_a_run_in_a_job_of_this_machine(plan, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    command = [str(plan), "--output", str(tmp_path / "out"), "--launcher", "submitit-local"]
    monkeypatch.setattr(study, "TRAIN", ["false"])
    assert study.main(command) == 1
    assert study.main([*command, "--status"]) == 0
    table = capsys.readouterr().out.splitlines()
    for words in (table[3].split(), table[-1].split()):
        assert [*words[:3], *words[4:]] == ["nl", "1", "failed", "exit", "status", "1"]


def test_several_processes_are_torchruns():
    assert study.train_command(1) == study.TRAIN
    python, *torchrun, script = study.train_command(2)
    assert [python, script] == study.TRAIN
    assert torchrun[-2:] == ["--standalone", "--nproc-per-node=2"]
    assert study.train_command(1, ["a.py", "b"]) == [*study.TRAIN, "--project=a.py", "--project=b"]


def test_nothing_runs_before_the_inputs_are_there(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "TRAIN", ["false"])
    words = [plan, "--output", tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "none.pth"]
    assert "none.pth, a file that does not exist" in error_of(capsys, study.main, *words)
    assert not list(tmp_path.glob("out/*/*/run.log"))


def test_errors_of_the_user(plan, tmp_path, capsys):
    assert "none.yaml" in error_of(capsys, study.main, tmp_path / "none.yaml")
    assert "--workers: '0' is not" in error_of(capsys, study.main, plan, "--workers", "0")
    assert "--seeds is 'one', not integers" in error_of(capsys, study.main, plan, "--seeds", "one")
    assert "a setting is 'ml'" in error_of(capsys, study.main, plan, "--settings", "ml")
    plan.write_text(plan.read_text().replace("MAX_ITER", "MAX_ITERS"))
    assert "did you mean 'SOLVER.MAX_ITER'" in error_of(capsys, study.main, plan)
    plan.write_text("nl")
    assert f"{plan}: a plan is" in error_of(capsys, study.main, plan)
