"""``python -m lab.benchmarks``."""

import json
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import pytest

from lab.benchmarks import __main__ as main_module
from lab.benchmarks.__main__ import main, parse_arguments
from lab.benchmarks.comparison import BLOCK, PASSES, MeasuredPass
from lab.benchmarks.implementations import NAMES, OURS, TEXTBOOK
from lab.benchmarks.measure import DIFFERS, FORWARD, MEASURED, OUT_OF_MEMORY, Outcome

ROOT = Path(__file__).resolve().parents[3]
GOOD = Outcome(MEASURED, 0.5, 3, 2_000_000, 1e-7)
SLOW = Outcome(MEASURED, 2.0, 3, 300_000_000, 1e-7)


def test_end_to_end(tmp_path):
    json_file, plot = tmp_path / "figures.json", tmp_path / "ratios.png"
    command = [sys.executable, "-m", "lab.benchmarks", "--quick", "--device", "cpu"]
    command += ["--stages", "res3", "--pairwise", "dot_product", "--threads", "1"]
    command += ["--json", str(json_file), "--plot", str(plot)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "The whole block" in result.stdout
    assert "The operation alone" in result.stdout
    assert "N = 960 is too small to tell" in result.stdout
    machine, rows = (json.loads(json_file.read_text())[key] for key in ("machine", "comparison"))
    assert machine["threads"] == 1
    assert machine["versions"]["torch"]
    assert {r["implementation"] for r in rows} == set(NAMES)
    assert all(r["status"] == MEASURED for r in rows if r["implementation"] in (OURS, TEXTBOOK))
    case = {"stage": "res3", "pairwise": "dot_product", "subsample": "none", "batch": 1}
    what = {"implementation": OURS, "level": BLOCK, "pass": FORWARD, "status": MEASURED, "note": ""}
    size = {"image_size": [192, 320], "positions": 960}
    assert {**rows[0], **case, **what, **size} == rows[0]
    assert all(rows[0][key] > 0 for key in ("seconds", "runs", "memory_bytes"))
    assert cv2.imread(str(plot)).std() > 1


@pytest.fixture
def measured(monkeypatch):
    """Lets the processes return what the test puts here for each pairwise function, or raise it."""
    outcomes = {}

    def run(function, case, on, budget, levels, names, **options):
        found = outcomes[case.pairwise]
        if isinstance(found, Exception):
            raise found
        return [
            MeasuredPass(case, name, level, which, outcome(case) if callable(outcome) else outcome)
            for level in levels
            for which in PASSES[level]
            for name, outcome in found.items()
        ]

    monkeypatch.setattr(main_module, "run_limited", run)
    return outcomes


def run_main(*pairwise):
    return main(["--stages", "res4", "--subsample", "none", "--pairwise", *pairwise])


def test_table(measured, capsys):
    lost = Outcome(OUT_OF_MEMORY, asked_bytes=72_000_000_000)
    measured["gaussian"] = {OURS: GOOD, TEXTBOOK: SLOW, "mmcv": lost}
    assert run_main("gaussian") == 0
    text = capsys.readouterr().out
    (ours, _), (textbook, alone), (mmcv, _) = (
        [line for line in text.splitlines() if line.startswith("res4") and name in line]
        for name in (OURS, TEXTBOOK, "mmcv")
    )
    assert "500.0 ms " in ours
    assert "(" not in ours
    assert "2.0 s (4x)" in textbook
    assert "300.0 MB (150x)" in textbook
    assert (textbook.count("(4x)"), alone.count("(4x)")) == (2, 1)
    assert "out of memory" in mmcv
    assert "asks for 72.0 GB" in mmcv
    assert "too small" not in text


def test_scaling(measured, tmp_path, capsys):
    def costs(power):
        def outcome(case):
            n = case.positions
            return Outcome(MEASURED, 1e-6 * n**power if n > 2048 else 1e-3, 3, 100 * n, 0.0)

        return outcome

    json_file, plot = tmp_path / "figures.json", tmp_path / "growth.svg"
    measured["dot_product"] = {OURS: costs(1), TEXTBOOK: costs(2)}
    measured["embedded_gaussian"] = {OURS: costs(2)}
    arguments = ["--scaling", "--markdown", "--json", str(json_file), "--plot", str(plot)]
    assert main([*arguments, "--pairwise", *measured]) == 0
    lines = [line.replace(" ", "") for line in capsys.readouterr().out.splitlines()]
    assert "|dot_product|nl_detectron|1|1|" in lines
    assert "|dot_product|textbookNxN|2|1|" in lines
    rows = json.loads(json_file.read_text())["scaling"]
    assert {r["positions"] for r in rows} == {2**power for power in range(10, 19)}
    softmax = [r["positions"] for r in rows if r["pairwise"] == "embedded_gaussian"]
    assert max(softmax) == 32 * 1024
    assert "<svg" in plot.read_text()


def test_no_exponent_of_a_single_point(measured, monkeypatch, capsys):
    monkeypatch.setattr(main_module, "POWERS", [10])
    measured["dot_product"] = {OURS: GOOD, TEXTBOOK: Outcome(OUT_OF_MEMORY)}
    assert main(["--scaling", "--pairwise", "dot_product"]) == 0
    last = [line for line in capsys.readouterr().out.splitlines() if "dot_product" in line][-1]
    assert last.split()[-2:] == ["-", "-"]


def test_fails_if_results_differ(measured, capsys):
    measured["gaussian"] = {OURS: GOOD, TEXTBOOK: Outcome(DIFFERS, difference=0.03)}
    assert run_main("gaussian") == 1
    assert "differs by 3.0e-02" in capsys.readouterr().out


def test_fails_if_ours_does_not_run(measured):
    measured["gaussian"] = {OURS: Outcome(OUT_OF_MEMORY), TEXTBOOK: GOOD}
    assert run_main("gaussian") == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BrokenProcessPool(), "the process was killed"),
        (MemoryError(), "the memory limit is too low"),
    ],
)
def test_goes_on_after_a_case_that_fails(error, reason, measured, capsys):
    measured["gaussian"] = error
    measured["dot_product"] = {OURS: GOOD, TEXTBOOK: SLOW}
    assert run_main("gaussian", "dot_product") == 1
    out, err = capsys.readouterr()
    assert f"res4 gaussian, subsample none, N = 4,200: {reason}" in err
    assert "2.0 s (4x)" in out
    with pytest.raises(SystemExit, match="nothing could be measured"):
        run_main("gaussian")


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("repository's root", "--quick", "minutes", "(default: all)")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "res9"], "invalid choice: 'res9' (choose from"),
        (["--batch", "0"], "'0' is not a whole number above 0"),
        (["--threads", "two"], "'two' is not a whole number above 0"),
        (["--memory-limit", "-1"], "'-1' is not a positive number"),
        (["--memory-limit", "nan"], "'nan' is not a positive number"),
        (["--device", "tpu"], "invalid choice: 'tpu' (choose from"),
        (["--json", "no/such/folder.json"], "there is no folder no/such"),
        (["--json", __file__], "which exists: name another one, or add --overwrite"),
        (["--plot", "figure.xyz"], "has to end in one of"),
        (["--scaling", "--stages", "res2"], "have no meaning with --scaling"),
        (["--scaling", "--pairwise", "global_context"], "no operation of its own for --scaling"),
    ],
)
def test_errors_of_the_user(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
