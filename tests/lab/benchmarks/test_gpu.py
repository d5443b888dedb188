"""``python -m lab.benchmarks.gpu``, tried on the CPU."""

import json
import subprocess
import sys
import zipfile

import pytest
import torch

from lab.benchmarks.comparison import BLOCK, OPERATION
from lab.benchmarks.gpu import __main__ as check
from lab.benchmarks.gpu.device_report import is_sound, write_report
from lab.benchmarks.gpu.kernels import KERNEL_NAMES, KERNELS
from lab.benchmarks.gpu.operation import flops
from lab.benchmarks.implementations import OURS, TEXTBOOK, Case, build_all, make_block
from lab.benchmarks.measure import FORWARD, FORWARD_BACKWARD, MEASURED

CPU = torch.device("cpu")
SMALL = {"batch": 2, "image_size": (64, 96)}


@pytest.mark.slow
def test_end_to_end(tmp_path):
    """Every section, at sizes for a try."""
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--minutes", "30"]
    assert check.main(arguments) == 0
    (text,) = (file.read_text(encoding="utf-8") for file in tmp_path.glob("*.md"))
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    found = {(row["section"], row["kind"]) for row in rows}
    assert {
        ("tests", "tests"),
        *(("block", kind) for kind in ("peaks", "outcome")),
        *(("softmax", kind) for kind in ("peaks", "outcome")),
        *(("detector", "detector"), ("ddp", "detector"), ("study", "study")),
    } <= found
    left_out = [row for row in rows if row["kind"] == "left out"]
    assert not left_out, left_out
    assert "| R50-FPN, one block, AMP, block compiled |" in text
    assert "bf16.png" in text
    assert (tmp_path / f"{file.stem}_bf16.png").stat().st_size > 1000
    names = {row["implementation"] for row in rows if row["section"] == "softmax" and "pass" in row}
    assert names == set(KERNEL_NAMES)


@pytest.fixture
def place(tmp_path):
    return check.Place(CPU, True, tmp_path, dict(check.os.environ))


def test_a_section_that_fails_or_takes_too_long(place, monkeypatch):
    monkeypatch.setattr(check, "_GRACE", 0.5)
    script = "import sys; print('said', file=sys.stderr); sys.exit('no such thing')"
    assert check._run(["-c", script], "a", place, 60) == "exit status 1: no such thing"
    assert check._run(["-c", "pass"], "b", place, 60) == ""
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    assert check._run(["-c", script], "c", place, 0.5) == "stopped after 1 s"


def test_what_is_missing_is_named(place, monkeypatch):
    monkeypatch.setattr(check, "_run", lambda *arguments: "exit status 1: No module named 'x'")
    for section in check.SECTIONS:
        (row,) = check._run_section(section, place, 1.0)
        assert row == {
            "kind": "left out",
            "what": "all of it",
            "why": "exit status 1: No module named 'x'",
        }


def test_no_time_left(tmp_path):
    rows = tmp_path / "rows"
    options = ["--device", "cpu", "--quick", "--rows", str(rows), "--seconds", "-1"]
    assert check.main([*options, "--section", "block"]) == 0
    first, *others = map(json.loads, rows.read_text().splitlines())
    assert first["kind"] == "peaks"
    assert {row["why"] for row in others} == {"no time left"}


def test_wheels_of_what_is_not_installed_are_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "WHEELS", tmp_path)
    for name in ("torch", "not_to_be_found"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "NAME = __name__")
    environment = check._environment(tmp_path / "scratch")
    script = "import torch, not_to_be_found as n; print(n.NAME, torch.zeros(1).item())"
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "not_to_be_found 0.0\n"


def test_no_cuda_device(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        check.main([])
    assert "PyTorch finds no CUDA device here" in capsys.readouterr().err


def test_flops():
    """2 products forward and 4 backward, over 24 queries, 6 keys and 512 channels."""
    product = 2 * 2 * 24 * 6 * 512
    counts = flops(Case("res4", "embedded_gaussian", "embeddings", **SMALL))
    assert counts[OPERATION] == {FORWARD: 2 * product, FORWARD_BACKWARD: 6 * product}
    assert counts[BLOCK][FORWARD] > counts[OPERATION][FORWARD]
    # Of 350 positions and 256 channels, phi^T g comes first: fewer than N x N.
    large = {"batch": 1, "image_size": (400, 448)}
    ours, n_by_n = (
        flops(Case("res3", name, **large))[OPERATION][FORWARD]
        for name in ("dot_product", "embedded_gaussian")
    )
    assert ours == 4 * 2800 * 256**2
    assert n_by_n == 4 * 2800**2 * 256
    assert flops(Case("res4", "concatenation", **SMALL)) == {}


@pytest.mark.parametrize("name", [n for n in KERNEL_NAMES if n != OURS])
def test_kernels_agree_or_say_why_not(name):
    block = make_block(Case("res2", "embedded_gaussian", **SMALL))
    (_, ours), (_, theirs) = build_all(block, [OURS, name], KERNELS)[0].values()
    inputs = [torch.randn(2, n, 128) for n in (24, 6, 6)]
    if name in ("SDPA cudnn_attention", "SDPA efficient_attention"):  # for GPUs only
        with pytest.raises(RuntimeError, match=r"kernel|backend|CUDA|not"):
            theirs(*inputs)
        return
    torch.testing.assert_close(theirs(*inputs), ours(*inputs), rtol=1e-4, atol=1e-5)


def outcome(implementation, seconds, **options):
    return {
        **{"section": "softmax", "kind": "outcome", "stage": "res4", "pairwise": "gaussian"},
        **{"subsample": "none", "batch": 2, "image_size": [800, 1344], "precision": "bf16"},
        **{"implementation": implementation, "level": OPERATION, "pass": FORWARD_BACKWARD},
        **{"status": MEASURED, "seconds": seconds, "runs": 3, "memory_bytes": 2_000_000},
        **{"difference": 0.0, "asked_bytes": None, "note": "", "flops": 10**12, **options},
    }


def test_report(tmp_path):
    machine = {"name": "GPU", "device": "cuda", "cores": 1, "threads": 1, "date": "2030-01-01T"}
    rows = [
        {"section": "softmax", "kind": "peaks", "size": 8, "flops_per_second": {"bf16": 8e14}},
        outcome(OURS, 0.005),
        outcome("dense", 0.0025),
        outcome(TEXTBOOK, 0.002),
        outcome("SDPA flash_attention", None, status="failed", note="too wide", memory_bytes=None),
        {"section": "softmax", "kind": "left out", "what": "the | rest", "why": "no time left"},
    ]
    assert is_sound(rows)
    assert not is_sound([outcome(OURS, None, status="failed")])
    assert not is_sound([{"section": "tests", "kind": "tests", "failed": ["test_a: no"]}])
    text = write_report(tmp_path, "GPU", {**machine, "versions": {}}, rows).read_text()
    place = "gaussian | res4 | bf16 |"
    assert f"| {place} 2 ms {TEXTBOOK} | 2.5 ms dense | 5 ms {OURS} |" in text
    assert f"| {place} **dense** | - | 2.5 ms | 2 MB | 400 | 50% |" in text
    assert f"| {place} SDPA flash_attention | - | failed | - | - | - | too wide |" in text
    assert "| softmax | the / rest | no time left |" in text
