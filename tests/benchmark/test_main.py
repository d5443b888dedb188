"""``python -m nl_detectron.benchmark``."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from nl_detectron.benchmark import __main__ as benchmark
from nl_detectron.benchmark.arguments import parse_arguments
from nl_detectron.benchmark.child import ChildError
from nl_detectron.benchmark.comparison import BLOCK, OPERATION, Row
from nl_detectron.benchmark.contestants import CONTESTANTS, OURS, TEXTBOOK
from nl_detectron.benchmark.measure import (
    DIFFERS,
    FORWARD,
    FORWARD_BACKWARD,
    MEASURED,
    OUT_OF_MEMORY,
    Outcome,
)

ROOT = Path(__file__).resolve().parents[2]
LEVELS_AND_PASSES = {(BLOCK, FORWARD), (BLOCK, FORWARD_BACKWARD), (OPERATION, FORWARD_BACKWARD)}
MACHINE = {"device", "name", "cores", "threads", "python", "versions", "date"}


def test_end_to_end(tmp_path):
    json_file, plot = tmp_path / "figures.json", tmp_path / "ratios.png"
    command = [sys.executable, "-m", "nl_detectron.benchmark", "--quick", "--device", "cpu"]
    command += ["--stages", "res3", "--pairwise", "dot_product", "--threads", "1"]
    command += ["--json", str(json_file), "--plot", str(plot)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "The whole block" in result.stdout
    assert "The operation alone" in result.stdout
    content = json.loads(json_file.read_text())
    assert set(content) == {"machine", "comparison"}
    assert set(content["machine"]) == MACHINE
    assert content["machine"]["threads"] == 1
    assert content["machine"]["versions"]["torch"]
    rows = content["comparison"]
    assert {(r["level"], r["pass"]) for r in rows} == LEVELS_AND_PASSES
    assert {r["implementation"] for r in rows} == set(CONTESTANTS)
    assert all(r["status"] == MEASURED for r in rows if r["implementation"] in (OURS, TEXTBOOK))
    assert cv2.imread(str(plot)).std() > 1


def test_scaling(tmp_path, capsys):
    json_file, plot = tmp_path / "figures.json", tmp_path / "growth.svg"
    arguments = ["--quick", "--scaling", "--pairwise", "dot_product", "--device", "cpu"]
    assert benchmark.main([*arguments, "--json", str(json_file), "--plot", str(plot)]) == 0
    assert "p of time" in capsys.readouterr().out
    points = json.loads(json_file.read_text())["scaling"]
    assert {p["positions"] for p in points} == set(benchmark.scaling.QUICK_POSITIONS)
    assert "<svg" in plot.read_text()


def test_accuracy(tmp_path, capsys):
    json_file = tmp_path / "errors.json"
    arguments = ["--quick", "--accuracy", "--markdown", "--device", "cpu"]
    assert benchmark.main([*arguments, "--json", str(json_file)]) == 0
    assert "| softmax_pairwise" in capsys.readouterr().out
    results = json.loads(json_file.read_text())["accuracy"]
    assert {r["function"] for r in results} == set(benchmark.accuracy.OPERATIONS)
    assert all(e < 5e-6 for r in results for e in r["errors"].values())


@pytest.fixture
def measured(monkeypatch):
    """Lets the processes return what the test puts here, or raise it."""
    outcomes = {}

    def run(function, case, *arguments, **options):
        if isinstance(outcomes[case.pairwise], Exception):
            raise outcomes[case.pairwise]
        return [
            Row(case, name, level, which, outcome)
            for level, which in LEVELS_AND_PASSES
            for name, outcome in outcomes[case.pairwise].items()
        ]

    monkeypatch.setattr(benchmark, "run_in_child", run)
    return outcomes


GOOD = Outcome(MEASURED, 0.5, 3, 2_000_000, 1e-7)
SLOW = Outcome(MEASURED, 2.0, 3, 300_000_000, 1e-7)


def run_main(*pairwise):
    return benchmark.main(["--stages", "res4", "--subsample", "none", "--pairwise", *pairwise])


def test_table(measured, capsys):
    lost = Outcome(OUT_OF_MEMORY, asked_bytes=72_000_000_000)
    measured["gaussian"] = {OURS: GOOD, TEXTBOOK: SLOW, "mmcv": lost}
    assert run_main("gaussian") == 0
    lines = capsys.readouterr().out.splitlines()
    (ours, _), (textbook, alone), (mmcv, _) = (
        [line for line in lines if line.startswith("res4") and name in line]
        for name in (OURS, TEXTBOOK, "mmcv")
    )
    assert "500.0 ms " in ours
    assert "(" not in ours
    assert "2.0 s (4x)" in textbook
    assert "300.0 MB (150x)" in textbook
    assert alone.count("(4x)") == 1
    assert textbook.count("(4x)") == 2
    assert "out of memory" in mmcv
    assert "asked for 72.0 GB" in mmcv


def test_fails_if_results_differ(measured, capsys):
    measured["gaussian"] = {OURS: GOOD, TEXTBOOK: Outcome(DIFFERS, difference=0.03)}
    assert run_main("gaussian") == 1
    assert "differs by 3.0e-02" in capsys.readouterr().out


def test_fails_if_ours_does_not_run(measured):
    measured["gaussian"] = {OURS: Outcome(OUT_OF_MEMORY), TEXTBOOK: GOOD}
    assert run_main("gaussian") == 1


def test_goes_on_when_a_process_is_killed(measured, capsys):
    measured["gaussian"] = ChildError("the process was killed")
    measured["dot_product"] = {OURS: GOOD, TEXTBOOK: SLOW}
    assert run_main("gaussian", "dot_product") == 1
    out, err = capsys.readouterr()
    assert "res4 gaussian, subsample none: the process was killed" in err
    assert "2.0 s (4x)" in out


def test_nothing_measured(measured):
    measured["gaussian"] = ChildError("the process was killed")
    with pytest.raises(SystemExit, match="nothing could be measured"):
        run_main("gaussian")


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("Examples:", "--quick", "minutes", "(default: all)"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "res9"], "invalid choice: 'res9' (choose from"),
        (["--batch", "0"], "'0' is not an integer of at least 1"),
        (["--threads", "two"], "'two' is not an integer of at least 1"),
        (["--memory-limit", "-1"], "'-1' is not a positive number"),
        (["--memory-limit", "nan"], "'nan' is not a positive number"),
        (["--device", "tpu"], "--device is 'tpu', but must be cpu or cuda"),
        (["--device", "meta"], "--device is 'meta', but must be cpu or cuda"),
        (["--json", "no/such/folder.json"], "there is no folder no/such"),
        (["--plot", "figure.xyz"], "has to end in one of"),
        (["--accuracy", "--plot", "figure.png"], "--plot has no meaning with --accuracy"),
        (["--accuracy", "--pairwise", "gaussian"], "--pairwise has no meaning with --accuracy"),
        (["--scaling", "--batch", "2"], "--batch has no meaning with --scaling"),
        (["--scaling", "--accuracy"], "not allowed with argument"),
    ],
)
def test_errors_of_the_user(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
