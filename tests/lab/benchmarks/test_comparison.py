"""Who takes part, that all compute the same, and what happens where memory is short."""

import importlib.util
import itertools
import os
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from lab.benchmarks.comparison import (
    BLOCK,
    OPERATION,
    PASSES,
    available_memory,
    compare,
    run_limited,
)
from lab.benchmarks.implementations import (
    NAMES,
    OURS,
    TEXTBOOK,
    BlockAround,
    Case,
    build_all,
    make_block,
)
from lab.benchmarks.measure import (
    FAILED,
    FORWARD_BACKWARD,
    MEASURED,
    OUT_OF_MEMORY,
    UNAVAILABLE,
    is_out_of_memory,
)
from nl_detectron import NonLocalBlock
from tests.layers import reference

CPU = torch.device("cpu")
SUBSAMPLE = tuple(reference.SUBSAMPLE)
FUNCTIONS = (*reference.PAIRWISE, "disentangled")
PEERS = ("mmcv.cnn.bricks.non_local", "pytorchvideo.layers.nonlocal_net", "timm.layers", "mmseg")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits memory on Linux only")


def call(function, *arguments, memory_limit=None):
    return run_limited(function, *arguments, device=CPU, threads=1, memory_limit=memory_limit)


@pytest.mark.parametrize("pairwise", FUNCTIONS)
@pytest.mark.parametrize("subsample", SUBSAMPLE)
def test_the_textbook_form_is_the_equation(pairwise, subsample):
    torch.manual_seed(0)
    block = NonLocalBlock(8, pairwise=pairwise, subsample=subsample, norm="").double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 8, 4, 6, dtype=torch.double)
    expected = reference.block(x, block.state_dict(), pairwise, subsample, scale=True)
    textbook, operation = build_all(block, [TEXTBOOK])[0][TEXTBOOK]
    torch.testing.assert_close(textbook(x), expected)
    torch.testing.assert_close(BlockAround(block, operation)(x), expected)


def test_the_textbook_form_of_a_global_context_is_the_equation():
    block = make_block(Case("res2", "global_context")).double()
    x = torch.randn(2, 256, 4, 6, dtype=torch.double)
    textbook, operation = build_all(block, [TEXTBOOK])[0][TEXTBOOK]
    torch.testing.assert_close(textbook(x), reference.global_context(x, block.state_dict()))
    assert operation is None


def takes_part(name, pairwise, subsample):
    if pairwise == "global_context":
        return name in (OURS, TEXTBOOK, "mmcv")
    return {
        OURS: True,
        TEXTBOOK: True,
        "mmcv": subsample in ("none", "embeddings") and pairwise != "disentangled",
        "PyTorchVideo": subsample in ("none", "input")
        and pairwise in ("embedded_gaussian", "dot_product"),
        "timm": (pairwise, subsample) == ("embedded_gaussian", "none"),
        "mmsegmentation": (pairwise, subsample) == ("disentangled", "none"),
        "mmsegmentation's ANN": (pairwise, subsample) == ("embedded_gaussian", "pyramid"),
    }[name]


@pytest.mark.parametrize(
    ("pairwise", "subsample"),
    [*itertools.product(FUNCTIONS, SUBSAMPLE), ("global_context", "none")],
)
def test_all_that_are_comparable_agree(pairwise, subsample):
    for module in PEERS:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    rows = compare(Case("res2", pairwise, subsample, 2, (32, 48)), CPU, budget=0)
    outcomes = {(row.implementation, row.level, row.which): row.outcome for row in rows}
    is_block = pairwise == "global_context"  # without an operation of its own
    levels = {BLOCK: PASSES[BLOCK]} if is_block else PASSES
    assert {(level, which) for _, level, which in outcomes} == {
        (level, which) for level, passes in levels.items() for which in passes
    }
    assert {name for name, level, _ in outcomes if level == BLOCK} == set(NAMES)
    operations = {name for name, level, _ in outcomes if level == OPERATION}
    assert operations >= (set() if is_block else {OURS, TEXTBOOK})
    for (name, _, which), outcome in outcomes.items():
        if not takes_part(name, pairwise, subsample):
            assert outcome.status == UNAVAILABLE
            assert outcome.note.startswith(f"{name} has no ")
            continue
        # mmcv divides what the ReLU's gradient needs in place.
        fails = (name, pairwise, which) == ("mmcv", "concatenation", FORWARD_BACKWARD)
        assert outcome.status == MEASURED or (fails and outcome.status == FAILED), outcome
        if outcome.status == MEASURED:
            assert outcome.seconds > 0
            assert outcome.runs >= 3
            assert outcome.memory_bytes > 0
            assert outcome.difference < 2e-5


def test_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.layers.non_local_attn", None)
    reasons = build_all(NonLocalBlock(8), NAMES)[1]
    assert reasons["timm"].startswith("timm is not installed: ")


def test_runs_in_a_process_of_its_own():
    assert call(os.getpid) != os.getpid()
    assert call(torch.get_num_threads) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        call(int, "one")
    with pytest.raises(BrokenProcessPool):
        call(os._exit, 1)


@only_linux
def test_who_runs_out_of_memory_says_how_much_it_asked_for():
    case = Case("res2", "concatenation", image_size=(384, 384))
    pairs = (96 * 96) ** 2
    rows = call(compare, case, CPU, 0.0, memory_limit=4 * pairs)
    outcomes = {row.implementation: row.outcome for row in rows if row.which == FORWARD_BACKWARD}
    assert outcomes[OURS].status == MEASURED
    assert (outcomes[TEXTBOOK].status, outcomes[TEXTBOOK].asked_bytes) == (OUT_OF_MEMORY, 4 * pairs)


@only_linux
def test_a_limit_that_is_too_low():
    case = Case("res2", "dot_product", image_size=(256, 256))
    with pytest.raises((RuntimeError, MemoryError)) as error:
        call(compare, case, CPU, 0.0, memory_limit=2**20)
    assert is_out_of_memory(error.value)
    assert available_memory() > 2**20
