import json

import pytest

import plot_metrics
from tests.commands import error_of


@pytest.fixture
def runs(tmp_path):
    for name in ("baseline", "nl"):
        (tmp_path / name).mkdir()
        record = json.dumps({"iteration": 19, "total_loss": 1.0, "bbox/AP": 30.0})
        (tmp_path / name / "metrics.json").write_text(record + "\n")
    return tmp_path


def test_draws_runs_into_one_file(runs, capsys):
    output = runs / "curves.svg"
    words = [runs / "baseline", runs / "nl" / "metrics.json", "--output", output]
    plot_metrics.main([str(word) for word in words])
    assert capsys.readouterr().out.strip() == str(output)
    assert "<svg" in output.read_text()


def test_labels_are_folder_names_or_given(runs, monkeypatch):
    paths = [runs / "baseline", runs / "nl" / "metrics.json"]
    assert list(plot_metrics.label_runs(paths, None)) == ["baseline", "nl"]
    assert plot_metrics.label_runs(paths, ["a", "b"]) == dict(zip("ab", paths))
    of_study = [runs / setting / "seed_1" for setting in ("baseline", "nl")]
    assert list(plot_metrics.label_runs(of_study, None)) == ["baseline/seed_1", "nl/seed_1"]
    monkeypatch.chdir(runs / "nl")
    assert list(plot_metrics.label_runs([plot_metrics.Path()], None)) == ["nl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none/metrics.json"], "none/metrics.json"),
        (["nl", "nl/metrics.json"], "2 runs have the label 'nl'"),
        (["baseline", "nl", "--labels", "a"], "--labels are 1, but the runs are 2"),
        (["baseline", "nl", "--labels", "b", "b"], "2 runs have the label 'b'"),
        (["nl", "--output", "curves.xyz"], "png"),
        (["broken"], "broken/metrics.json, line 1"),
    ],
)
def test_errors_of_the_user(words, message, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "broken").mkdir()
    (runs / "broken" / "metrics.json").write_text("{")
    assert message in error_of(capsys, plot_metrics.main, "--output", "curves.png", *words)
    assert not (runs / "curves.png").exists()
