import time

import pytest
import torch
from detectron2.engine import SimpleTrainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lab.cost import measure_cost, measure_training, without_blocks
from nl_detectron import NonLocalBlock
from nl_detectron.layers.nonlocal_block import PAIRWISE, SUBSAMPLE

C, H, W = 8, 6, 10


def make_model():
    """Two convolutions with a block between them."""
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), make_block(), nn.Conv2d(C, 2 * C, 1))


def make_block(**options):
    return NonLocalBlock(C, zero_init=False, **options)  # at zero it would be skipped


def image(count=1):
    return torch.randn(count, C, H, W)


def test_parameters_and_multiply_adds():
    model = make_model()
    report = measure_cost(model, image(), repeats=1)
    block_parameters = sum(p.numel() for p in model[1].parameters())
    assert report.without_blocks.parameters == (9 * C + 1) * C + (C + 1) * 2 * C
    assert report.without_blocks.macs == H * W * (9 * C * C + C * 2 * C)
    assert list(report.blocks) == ["1"]
    assert report.blocks["1"].parameters == block_parameters
    assert report.with_blocks.parameters == report.without_blocks.parameters + block_parameters
    assert report.with_blocks.macs == report.without_blocks.macs + report.blocks["1"].macs
    assert report.block_inputs == {"1": [(1, C, H, W)]}


@pytest.mark.parametrize("subsample", SUBSAMPLE)
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_multiply_adds_are_those_that_pytorch_counts_when_they_are_done(pairwise, subsample):
    model = nn.Sequential(make_block(pairwise=pairwise, subsample=subsample, norm="")).eval()
    x = image(count=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    # PyTorch counts a multiply-add as two flops, and batch norm and average pooling, which fvcore
    # counts, one for each element, not at all.
    pooled = 0
    if subsample == "pyramid":
        pooled = C * 4 * x[:, 0].numel()  # x, before phi, g and m; 4 levels
    if PAIRWISE[pairwise].is_scaled:  # the softmax centres phi and g by means of groups of keys
        keys = model[0].attention(x, [0])[0, 0].numel()
        pooled += len(x) * keys * (C + C // 2 if pairwise == "gaussian" else C)
    macs = measure_cost(model, x, repeats=1).blocks["0"].macs
    assert macs - pooled == counter.get_total_flops() // 2


def test_time_and_memory_of_the_block():
    class SlowBlock(NonLocalBlock):
        def forward(self, x):
            for _ in range(200):
                torch.randn(2**16)
            return x + torch.zeros(2**20, dtype=torch.uint8)[0]

    report = measure_cost(nn.Sequential(nn.Conv2d(C, C, 1), SlowBlock(C)), image())
    assert report.time_ratio > 2
    assert report.with_blocks.seconds > 2 * report.without_blocks.seconds
    assert report.blocks["1"].seconds > report.without_blocks.seconds
    assert report.blocks["1"].peak_memory >= 2**20
    assert report.with_blocks.peak_memory >= 2**20 > report.without_blocks.peak_memory > 0


def test_block_that_is_called_twice_and_one_that_is_given_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.empty = make_block(), make_block()

        def forward(self, x):
            self.empty(x[:0])
            return self.shared(self.shared(x)[:, :, ::2])

    report = measure_cost(Model(), image(), repeats=1)
    once = measure_cost(nn.Sequential(make_block()), image(), repeats=1)
    half = measure_cost(nn.Sequential(make_block()), image()[:, :, ::2], repeats=1)
    assert report.block_inputs["shared"] == [(1, C, H, W), (1, C, H // 2, W)]
    assert report.blocks["shared"].macs == once.blocks["0"].macs + half.blocks["0"].macs
    assert report.blocks["shared"].peak_memory == once.blocks["0"].peak_memory
    empty = report.blocks["empty"]
    assert (empty.macs, empty.seconds, empty.peak_memory) == (0, 0, 0)
    assert empty.parameters > 0


def test_model_is_left_as_it_was():
    model = make_model().train()
    modules = dict(model.named_modules())
    measure_cost(model, image(), repeats=1)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(make_model().state_dict())
    assert all(module.training for module in model.modules())


def test_without_blocks_is_the_model_without_them():
    model = make_model().eval()
    x = image()
    with without_blocks(model):
        assert torch.equal(model(x), model[2](model[0](x)))
    assert not torch.equal(model(x), model[2](model[0](x)))


def test_blocks_come_back_after_an_error():
    model = make_model()
    with pytest.raises(RuntimeError), without_blocks(model):
        raise RuntimeError
    assert isinstance(model[1], NonLocalBlock)


def test_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no non-local blocks"):
        measure_cost(nn.Sequential(nn.Conv2d(C, C, 1)), image())


def test_training():
    """A block whose weights are most of the model; data that take half of the time without it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.block = nn.Conv2d(256, 4, 1), NonLocalBlock(256)

        def forward(self, x):
            time.sleep(0.02)
            if isinstance(self.block, NonLocalBlock):
                time.sleep(0.04)
            return {"loss": self.conv(self.block(x)).sum()}

    def slow_data():
        while True:
            time.sleep(0.02)
            yield torch.randn(1, 256, 2, 2)

    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    whole, rest = measure_training(SimpleTrainer(model, slow_data(), optimizer), iterations=3)
    assert whole.seconds > 0.08
    assert 0.04 < rest.seconds < whole.seconds
    assert 0.05 < whole.data_share < rest.data_share < 0.6
    # Weights, gradients and momentum.
    weights = sum(p.numel() for p in model.parameters())
    assert 12 * weights < whole.peak_memory < 12 * weights + 2**18
    without = sum(p.numel() for p in model.conv.parameters())
    assert 12 * without < rest.peak_memory < 12 * without + 2**18
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
