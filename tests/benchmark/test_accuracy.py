import itertools

import pytest
import torch

from nl_detectron.benchmark import accuracy

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("function", "mean"), itertools.product(accuracy.OPERATIONS, accuracy.MEANS)
)
def test_float32_is_close_to_float64(function, mean):
    result = accuracy.measure_accuracy(function, 1500, mean, CPU)
    assert list(result.errors) == list(accuracy.QUANTITIES)
    assert min(result.errors.values()) > 0
    assert max(result.errors.values()) < 5e-6


def test_sees_lost_digits(monkeypatch):
    ours, equation = accuracy.OPERATIONS["dot_product_pairwise"]

    def coarse(*inputs):
        return ours(*(t.bfloat16() for t in inputs)).float()

    monkeypatch.setitem(accuracy.OPERATIONS, "dot_product_pairwise", (coarse, equation))
    result = accuracy.measure_accuracy("dot_product_pairwise", 100, 0.0, CPU)
    assert min(result.errors.values()) > 1e-4


def test_blocks_of_queries_do_not_change_the_reference(monkeypatch):
    whole = accuracy.measure_accuracy("softmax_pairwise", 200, 3.0, CPU)
    monkeypatch.setattr(accuracy, "_PAIRS_PER_BLOCK", 7 * 200)
    blockwise = accuracy.measure_accuracy("softmax_pairwise", 200, 3.0, CPU)
    assert blockwise.errors == pytest.approx(whole.errors, rel=1e-3)
