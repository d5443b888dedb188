import pytest
import torch

from lab.memory import peak_memory

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    ),
]
KIB = 1024


@pytest.mark.parametrize("device", DEVICES)
def test_counts_what_is_held_at_a_time(device):
    def compute():
        a = torch.empty(64 * KIB, dtype=torch.uint8, device=device)
        b = a.clone()
        del a, b
        return torch.empty(96 * KIB, dtype=torch.uint8, device=device)

    assert peak_memory(compute, device) == 128 * KIB


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_held_before_does_not_count(device):
    weights = torch.ones(64 * KIB, dtype=torch.uint8, device=device)
    assert peak_memory(lambda: weights.neg_(), device) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_backward_pass_needs_counts(device):
    x = torch.ones(64 * KIB, device=device, requires_grad=True)
    forward = peak_memory(lambda: x.exp().sin().sum(), device)
    assert peak_memory(lambda: x.exp().sin().sum().backward(), device) > forward


def test_an_error_in_what_is_measured_passes_through():
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
