import pytest
import torch

from nl_detectron.benchmark.contestants import OURS, TEXTBOOK
from nl_detectron.benchmark.measure import MEASURED, OUT_OF_MEMORY, Outcome
from nl_detectron.benchmark.scaling import (
    MAX_SOFTMAX_POSITIONS,
    POSITIONS,
    Point,
    fit_growth,
    measure_at,
    positions_for,
)


def point(implementation, n, power, status=MEASURED):
    outcome = Outcome(status, seconds=1e-6 * n**power, memory_bytes=100 * n)
    return Point("dot_product", implementation, n, outcome)


def test_exponents_are_those_of_large_inputs():
    ours = [point(OURS, n, 1.0 if n > 1024 else 0.0) for n in POSITIONS]
    textbook = [point(TEXTBOOK, n, 2.0) for n in POSITIONS[:3]]
    textbook.append(Point("dot_product", TEXTBOOK, POSITIONS[3], Outcome(OUT_OF_MEMORY)))
    first, second = fit_growth([*ours, *textbook])
    assert (first.implementation, second.implementation) == (OURS, TEXTBOOK)
    assert first.time_exponent == pytest.approx(1)
    assert second.time_exponent == pytest.approx(2)
    assert first.memory_exponent == pytest.approx(1)
    assert second.memory_exponent == pytest.approx(1)


def test_no_exponent_of_a_single_point():
    (growth,) = fit_growth([point(OURS, 1024, 1.0)])
    assert growth.time_exponent is growth.memory_exponent is None


def test_the_softmax_stops_early():
    assert positions_for("dot_product", POSITIONS) == list(POSITIONS)
    assert positions_for("concatenation", POSITIONS)[-1] == 256 * 1024
    assert positions_for("embedded_gaussian", POSITIONS)[-1] == MAX_SOFTMAX_POSITIONS


def test_both_forms_are_measured():
    points = measure_at("concatenation", 64, torch.device("cpu"), budget=0)
    assert [p.implementation for p in points] == [OURS, TEXTBOOK]
    assert all(p.outcome.status == MEASURED for p in points)
    assert points[0].as_dict()["positions"] == 64
    assert points[0].as_dict()["seconds"] > 0
