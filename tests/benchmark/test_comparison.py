"""Who takes part, and that all compute the same."""

import itertools
import json
import sys

import pytest
import torch

from nl_detectron.benchmark.cases import Case
from nl_detectron.benchmark.comparison import BLOCK, OPERATION, compare
from nl_detectron.benchmark.contestants import CONTESTANTS, OURS, TEXTBOOK
from nl_detectron.benchmark.measure import (
    FAILED,
    FORWARD,
    FORWARD_BACKWARD,
    MEASURED,
    PASSES,
    UNAVAILABLE,
)
from nl_detectron.layers.nonlocal_block import PAIRWISE, SUBSAMPLE

CPU = torch.device("cpu")
SMALL = (32, 48)
PEERS = {
    "mmcv": "mmcv.cnn.bricks.non_local",
    "PyTorchVideo": "pytorchvideo.layers.nonlocal_net",
    "timm": "timm.layers.non_local_attn",
}


def takes_part(name, pairwise, subsample):
    return {
        "mmcv": subsample != "input",
        "PyTorchVideo": subsample != "embeddings"
        and pairwise in ("embedded_gaussian", "dot_product"),
        "timm": (pairwise, subsample) == ("embedded_gaussian", "none"),
    }[name]


@pytest.mark.parametrize(("pairwise", "subsample"), itertools.product(PAIRWISE, SUBSAMPLE))
def test_all_that_are_comparable_agree(pairwise, subsample):
    for module in PEERS.values():
        pytest.importorskip(module)
    rows = compare(Case("res2", pairwise, subsample, 2, SMALL), CPU, budget=0)
    outcomes = {(row.implementation, row.level, row.which): row.outcome for row in rows}
    for name in (OURS, TEXTBOOK):
        assert outcomes[name, OPERATION, FORWARD_BACKWARD].status == MEASURED
        assert all(outcomes[name, BLOCK, which].status == MEASURED for which in PASSES)
    for which in PASSES:
        for name in PEERS:
            outcome = outcomes[name, BLOCK, which]
            if not takes_part(name, pairwise, subsample):
                assert outcome.status == UNAVAILABLE
                assert outcome.note.startswith("not comparable: ")
            # mmcv divides what the ReLU's gradient needs in place.
            elif (name, pairwise) == ("mmcv", "concatenation") and which != FORWARD:
                assert outcome.status in (MEASURED, FAILED)
            else:
                assert outcome.status == MEASURED, outcome
    measured = [outcome for outcome in outcomes.values() if outcome.status == MEASURED]
    assert all(o.seconds > 0 and o.runs >= 3 and o.memory_bytes > 0 for o in measured)
    assert all(o.difference < 2e-5 for key, o in outcomes.items() if key[0] == TEXTBOOK)


def test_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, PEERS["timm"], None)
    rows = compare(Case("res2", "embedded_gaussian", image_size=SMALL), CPU, budget=0)
    (note,) = {row.outcome.note for row in rows if row.implementation == "timm"}
    assert note.startswith("not installed: ")


def test_rows_for_json():
    case = Case("res3", "dot_product", "embeddings", image_size=(64, 80))
    rows = [row.as_dict() for row in compare(case, CPU, budget=0)]
    assert {row["implementation"] for row in rows} == set(CONTESTANTS)
    ours = rows[0]
    assert json.loads(json.dumps(ours)) == {
        "stage": "res3",
        "pairwise": "dot_product",
        "subsample": "embeddings",
        "batch": 1,
        "image_size": [64, 80],
        "channels": 512,
        "queries": 80,
        "keys": 20,
        "implementation": OURS,
        "level": BLOCK,
        "pass": FORWARD,
        "status": MEASURED,
        "seconds": ours["seconds"],
        "runs": ours["runs"],
        "memory_bytes": ours["memory_bytes"],
        "difference": None,
        "asked_bytes": None,
        "note": "",
    }
