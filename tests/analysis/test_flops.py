import sys
from math import prod

import pytest
import torch
from detectron2.utils.analysis import FlopCountAnalysis as DetectorFlopCountAnalysis
from fvcore.nn import FlopCountAnalysis, parameter_count
from torch.utils.flop_counter import FlopCounterMode

from nl_detectron import GlobalContextBlock, NonLocalBlock
from nl_detectron.analysis.flops import flop_handles, register_flop_handles
from nl_detectron.layers.nonlocal_block import PAIRWISE, SUBSAMPLE

B, C = 2, 16


@pytest.fixture
def table(monkeypatch):
    """fvcore's table of operators; it is as it was after the test."""
    module = sys.modules["fvcore.nn.flop_count"]
    monkeypatch.setattr(module, "_DEFAULT_SUPPORTED_OPS", dict(module._DEFAULT_SUPPORTED_OPS))
    return module._DEFAULT_SUPPORTED_OPS


@pytest.fixture
def registered(table):
    register_flop_handles()


def analyse(block, x, analysis=FlopCountAnalysis):
    analysis = analysis(block, x)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


@pytest.mark.parametrize("subsample", SUBSAMPLE)
@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.usefixtures("registered")
def test_block_is_counted_as_it_is_done(pairwise, subsample):
    """As PyTorch counts in eager mode; on small and large grids, of which some are folded."""
    for dims, grid in ((1, (40,)), (2, (6, 10)), (2, (26, 30)), (3, (3, 8, 6))):
        options = {"dims": dims, "pairwise": pairwise, "subsample": subsample}
        block = NonLocalBlock(C, **options, norm="").eval()
        x = torch.randn(B, C, *grid)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(x)
        analysis = analyse(block, x)
        # fvcore counts average pooling, one for each element, but not max-pooling.
        macs = analysis.total() - analysis.by_operator()["adaptive_avg_pool2d"]
        assert macs == counter.get_total_flops() // 2
        assert not analysis.unsupported_ops()


@pytest.mark.parametrize(
    ("stage", "subsample"), [((256, 40, 40), "pyramid"), ((256, 10, 10), "embeddings")]
)
@pytest.mark.usefixtures("registered")
def test_few_keys_are_counted_by_the_formula(stage, subsample):
    """Forward, and forward and backward, for one image."""
    (channels, *grid), inner = stage, stage[0] // 2
    queries = prod(grid)
    keys = 110 if subsample == "pyramid" else queries // 4
    made_of = queries if subsample == "embeddings" else keys  # positions that phi and g are made of
    block = NonLocalBlock(channels, subsample=subsample, norm="")
    x = torch.randn(1, channels, *grid, requires_grad=True)
    macs = 2 * made_of * inner * channels  # phi and g
    macs += 2 * keys * inner * channels + 2 * queries * keys * channels  # folded, and the pairs
    macs += keys * inner + inner * channels  # the bias of theta, and what all g have in common
    with FlopCounterMode(display=False) as counter:
        z = block(x)
        forward = counter.get_total_flops() // 2
        z.sum().backward()
    assert forward == macs
    assert 2.9 * macs < counter.get_total_flops() // 2 <= 3 * macs
    analysis = analyse(block.eval(), x)
    assert analysis.total() - analysis.by_operator()["adaptive_avg_pool2d"] == macs


@pytest.mark.parametrize(
    ("subsample", "gmacs"), [("none", 24.8), ("embeddings", 12.5), ("input", 9.34)]
)
@pytest.mark.usefixtures("registered")
def test_block_of_res4_at_800_x_1280(subsample, gmacs):
    """2.10 M parameters; the GMACs are those published for this block."""
    block = NonLocalBlock(1024, subsample=subsample, norm="").eval()
    analysis = analyse(block, torch.zeros(1, 1024, 50, 80))
    assert analysis.total() / 1e9 == pytest.approx(gmacs, rel=0.005)
    assert parameter_count(block)[""] / 1e6 == pytest.approx(2.10, abs=0.005)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.usefixtures("registered")
def test_global_context_is_counted_by_the_formula(dims):
    grid = (12, 5, 2)[:dims]
    block = GlobalContextBlock(C, reduction=4, dims=dims).eval()
    analysis = analyse(block, torch.randn(B, C, *grid))
    # w_k x and the weighted sum for each position, and two products for all of them.
    assert analysis.total() - norm_flops(analysis) == B * (2 * C * prod(grid) + 2 * C * C // 4)
    assert not analysis.unsupported_ops()


def norm_flops(analysis):
    return analysis.by_operator()["layer_norm"]


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", "LN", ""])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("analysis", [FlopCountAnalysis, DetectorFlopCountAnalysis])
@pytest.mark.usefixtures("registered")
def test_no_operator_is_unknown(norm, training, analysis):
    block = NonLocalBlock(64, norm=norm, subsample="input").train(training)
    analysis = analyse(block, torch.randn(2, 64, 4, 4), analysis)
    assert analysis.total() > 0
    assert not analysis.unsupported_ops()


def test_importing_registers_nothing(table):
    assert "aten::scaled_dot_product_attention" not in table


def test_registered_handles_stay(table):
    def theirs(inputs, outputs):
        return 1

    table["aten::sort"] = theirs
    register_flop_handles()
    attention = flop_handles()["aten::scaled_dot_product_attention"]
    assert flop_handles().keys() <= table.keys()
    assert table["aten::sort"] is theirs
    assert table["aten::scaled_dot_product_attention"] is attention


def test_fvcore_without_the_table(monkeypatch):
    monkeypatch.delattr(sys.modules["fvcore.nn.flop_count"], "_DEFAULT_SUPPORTED_OPS")
    register_flop_handles()
