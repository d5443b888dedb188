import pytest
import torch

from nl_detectron.benchmark.measure import (
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

CPU = torch.device("cpu")


def attend(theta, phi, g, scale=0.25):
    return (scale * theta @ phi.mT).softmax(2) @ g


def half_its_gradient(theta, phi, g):
    return attend(theta, phi, g.detach() / 2 + g / 2)


def not_a_number(theta, phi, g):
    return attend(theta, phi, g) * float("nan")


def too_large(theta, phi, g):
    torch.empty(2**60, dtype=torch.uint8)


def wrong_shape(theta, phi, g):
    return theta @ g


def trial(function):
    torch.manual_seed(0)
    inputs = tuple(torch.randn(1, 8, 16).requires_grad_() for _ in range(3))
    return Trial(function, inputs, torch.randn(1, 8, 16))


def outcome_of(function, which):
    trials = {"first": trial(attend), "second": trial(function)}
    outcomes = measure(trials, which, CPU, budget=0)
    assert list(outcomes) == ["first", "second"]
    assert outcomes["first"].status == MEASURED
    return outcomes["second"]


@pytest.mark.parametrize("which", [FORWARD, FORWARD_BACKWARD])
def test_measured(which):
    outcome = outcome_of(lambda *inputs: attend(*inputs) + 0, which)
    assert outcome.status == MEASURED
    assert outcome.difference == 0
    assert outcome.runs == 1 + MIN_ROUNDS
    assert outcome.seconds > 0


def test_memory_is_that_of_the_pass():
    def ten_times(theta, phi, g):
        return attend(theta, phi, g) + torch.zeros(10, 8, 16).sum(0)

    extra = outcome_of(ten_times, FORWARD).memory_bytes - outcome_of(attend, FORWARD).memory_bytes
    assert 8 * 8 * 16 * 4 <= extra <= 12 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("function", "which"),
    [
        (lambda *inputs: attend(*inputs, scale=0.26), FORWARD),
        (lambda *inputs: attend(*inputs, scale=0.26), FORWARD_BACKWARD),
        (half_its_gradient, FORWARD_BACKWARD),
        (not_a_number, FORWARD),
    ],
)
def test_what_differs_is_not_timed(function, which):
    outcome = outcome_of(function, which)
    assert outcome.status == DIFFERS
    assert outcome.seconds is None
    assert not outcome.difference < 1e-4


def test_gradients_do_not_count_in_the_forward_pass():
    assert outcome_of(half_its_gradient, FORWARD).status == MEASURED


def test_out_of_memory():
    outcome = outcome_of(too_large, FORWARD)
    assert (outcome.status, outcome.asked_bytes) == (OUT_OF_MEMORY, 2**60)


def test_another_error():
    outcome = outcome_of(wrong_shape, FORWARD)
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
    assert asked_bytes(message) == expected


def test_relative_difference_is_that_of_the_worst():
    ones, tens = torch.ones(3), torch.tensor([10.0, 1, 1])
    assert relative_difference([ones, tens], [ones, tens]) == 0
    assert relative_difference([ones, tens + 0.5], [ones, tens]) == pytest.approx(0.05)


def test_all_take_turns():
    calls = []

    def called(name):
        return lambda *inputs: calls.append(name) or attend(*inputs)

    measure({name: trial(called(name)) for name in "ab"}, FORWARD, CPU, budget=0)
    assert "".join(calls) == "ab" + "ab" * MIN_ROUNDS


def test_what_is_slow_runs_once(monkeypatch):
    calls = []
    monkeypatch.setattr("nl_detectron.benchmark.measure.SLOW_SECONDS", 0)
    slow = trial(lambda *inputs: calls.append(1) or attend(*inputs))
    outcome = measure({"slow": slow}, FORWARD, CPU, budget=0)["slow"]
    assert (outcome.status, outcome.runs, len(calls)) == (MEASURED, 1, 1)
    assert outcome.seconds > 0
