"""No tool replaces a file that it was given by name, unless it is told to; its sources never."""

import importlib
import json
import sys
from pathlib import Path

import pytest

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quick_start.yaml"
TOOLS = {
    "subset_coco_json": "{source} {target} --images 1",
    "convert_weights": "{source} {target}",
    "check_data": "{source} . --drop-bad {target}",
    "plot_metrics": "{source} --output {target}",
    "lab.analyze": "--config-file x --weights {source} --image x --json {target}",
    "inspect_blocks": "{source} --config-file {config} --json {target}",
    "lab.compare_runs": "{run} {run} --json {target}",
    "export": "--config-file {config} --weights {source} --image x --output {target}",
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a tool; returns its last line on stderr."""
    (tmp_path / "run" / "inference").mkdir(parents=True)
    places = {
        "config": CONFIG,
        "run": tmp_path / "run",
        "source": tmp_path / "source.pth",
        "target": tmp_path / "target.pth",
    }

    def run_tool(tool, *more, **changed):
        words = TOOLS[tool].format(**{**places, **changed}).split()
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *words, *more])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(tool).main()
        return capsys.readouterr().err.splitlines()[-1]

    return run_tool


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_there_stays(tool, run, tmp_path):
    source, target = tmp_path / "source.pth", tmp_path / "target.pth"
    if tool == "lab.compare_runs":
        source = tmp_path / "run" / "inference" / "coco_instances_results.json"
    for file in (source, target):
        file.write_text("mine")
    assert f"is {target}, which exists: name another one, or add --overwrite" in run(tool)
    link = tmp_path / "link.pth"
    link.symlink_to(source)
    for same in (source, link):
        line = run(tool, "--overwrite", target=same)
        assert f"is {same}, which is the source: name another one" in line
    assert run(tool, "--overwrite", target=tmp_path).endswith("which is a folder, not a file")
    assert source.read_text() == target.read_text() == "mine"


def test_settings_beside_converted_weights_stay(run, tmp_path):
    (tmp_path / "source.pth").write_text("mine")
    (tmp_path / "target.yaml").write_text("mine")
    assert f"target is {tmp_path / 'target.yaml'}, which exists" in run("convert_weights")
    (tmp_path / "source.yaml").write_text("mine")
    line = run("convert_weights", "--overwrite", source=tmp_path / "target.yaml")
    assert "target.yaml, which is the source" in line


def test_overwrite_replaces(run, tmp_path, monkeypatch):
    source, target = tmp_path / "all.json", tmp_path / "some.json"
    coco = {"images": [{"id": 1}], "annotations": [], "categories": []}
    source.write_text(json.dumps(coco))
    target.write_text("old")
    words = ["subset_coco_json.py", str(source), str(target), "--images", "1", "--overwrite"]
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module("subset_coco_json").main()
    assert json.loads(target.read_text()) == coco
