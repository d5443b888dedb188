import pytest
import torch

from lab.benchmarks import measure as measuring
from lab.benchmarks.measure import (
    DIFFERS,
    FAILED,
    FORWARD,
    FORWARD_BACKWARD,
    MEASURED,
    MIN_ROUNDS,
    OUT_OF_MEMORY,
    Trial,
    asked_bytes,
    measure,
    relative_difference,
)


def attend(theta, phi, g, scale=0.25):
    return (scale * theta @ phi.mT).softmax(2) @ g


def half_its_gradient(theta, phi, g):
    return attend(theta, phi, g.detach() / 2 + g / 2)


def trial(function):
    torch.manual_seed(0)
    inputs = tuple(torch.randn(1, 8, 16).requires_grad_() for _ in range(3))
    return Trial(function, inputs, torch.randn(1, 8, 16))


def outcome_of(function, which=FORWARD):
    trials = {"first": trial(attend), "second": trial(function)}
    outcomes = measure(trials, which, torch.device("cpu"), budget=0)
    assert list(outcomes) == ["first", "second"]
    assert outcomes["first"].status == MEASURED
    return outcomes["second"]


@pytest.mark.parametrize("which", [FORWARD, FORWARD_BACKWARD])
def test_measured(which):
    outcome = outcome_of(lambda *inputs: attend(*inputs) + 0, which)
    assert (outcome.status, outcome.difference) == (MEASURED, 0)
    assert outcome.runs == 1 + MIN_ROUNDS
    assert outcome.seconds > 0


def test_memory_is_that_of_the_pass():
    def ten_times(theta, phi, g):
        return attend(theta, phi, g) + torch.zeros(10, 8, 16).sum(0)

    extra = outcome_of(ten_times).memory_bytes - outcome_of(attend).memory_bytes
    assert 8 * 8 * 16 * 4 <= extra <= 12 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("function", "which"),
    [
        (lambda *inputs: attend(*inputs, scale=0.26), FORWARD),
        (lambda *inputs: attend(*inputs, scale=0.26), FORWARD_BACKWARD),
        (half_its_gradient, FORWARD_BACKWARD),
        (lambda *inputs: attend(*inputs) * float("nan"), FORWARD),
    ],
)
def test_what_differs_is_not_timed(function, which):
    outcome = outcome_of(function, which)
    assert (outcome.status, outcome.seconds) == (DIFFERS, None)
    assert not outcome.difference < 1e-4


def test_gradients_do_not_count_in_the_forward_pass():
    assert outcome_of(half_its_gradient).status == MEASURED


def test_out_of_memory():
    outcome = outcome_of(lambda *inputs: torch.empty(2**60, dtype=torch.uint8))
    assert (outcome.status, outcome.asked_bytes) == (OUT_OF_MEMORY, 2**60)


def test_another_error():
    outcome = outcome_of(lambda theta, phi, g: theta @ g)
    assert outcome.status == FAILED
    assert "size" in outcome.note


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("can't allocate memory: you tried to allocate 18063360000 bytes.", 18063360000),
        ("CUDA out of memory. Tried to allocate 16.82 GiB. GPU 0 has", round(16.82 * 2**30)),
        ("CUDA out of memory. Tried to allocate 512.00 MiB. GPU", 2**29),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_asked_bytes(message, expected):
    assert asked_bytes(RuntimeError(message)) == expected


def test_relative_difference_is_that_of_the_worst():
    ones, tens = torch.ones(3), torch.tensor([10.0, 1, 1])
    assert relative_difference([ones, tens], [ones, tens]) == 0
    assert relative_difference([ones, tens + 0.5], [ones, tens]) == pytest.approx(0.05)


@pytest.mark.parametrize("slow_seconds", [0, 8])
def test_all_take_turns_unless_they_are_slow(slow_seconds, monkeypatch):
    monkeypatch.setattr(measuring, "SLOW_SECONDS", slow_seconds)
    calls = []

    def called(name):
        return trial(lambda *inputs: calls.append(name) or attend(*inputs))

    outcomes = measure({name: called(name) for name in "ab"}, FORWARD, torch.device("cpu"), 0)
    turn = "aabb"  # each warms up before it is timed
    assert "".join(calls) == "ab" + (turn * MIN_ROUNDS if slow_seconds else "")
    assert all(o.runs == (1 + MIN_ROUNDS if slow_seconds else 1) for o in outcomes.values())
