import json

import pytest

import plot_metrics


@pytest.fixture
def runs(tmp_path):
    for name in ("baseline", "nl"):
        (tmp_path / name).mkdir()
        record = json.dumps({"iteration": 19, "total_loss": 1.0, "bbox/AP": 30.0})
        (tmp_path / name / "metrics.json").write_text(record + "\n")
    return tmp_path


def fail(capsys, *words):
    """The one line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        plot_metrics.main([str(word) for word in words])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


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


def test_errors_of_the_user(runs, capsys):
    output = ["--output", runs / "curves.png"]
    baseline, nl = runs / "baseline", runs / "nl"
    assert "none/metrics.json" in fail(capsys, runs / "none" / "metrics.json", *output)
    assert "'nl'" in fail(capsys, nl, nl / "metrics.json", *output)
    message = fail(capsys, baseline, nl, *output, "--labels", "a")
    assert "--labels" in message
    assert "1" in message
    assert "'b'" in fail(capsys, baseline, nl, *output, "--labels", "b", "b")
    assert "png" in fail(capsys, nl, "--output", runs / "curves.xyz")
    (nl / "metrics.json").write_text("{")
    assert f"{nl / 'metrics.json'}, line 1" in fail(capsys, nl, *output)
    assert not (runs / "curves.png").exists()
