import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nl_detectron import GlobalContextBlock, NonLocalBlock
from nl_detectron.analysis.block_report import inspect_blocks
from nl_detectron.layers.nonlocal_block import PAIRWISE

C, H, W = 8, 4, 6  # fewer positions than are sampled: all are


def make_block(**options):
    torch.manual_seed(0)
    block = NonLocalBlock(C, **{"norm": "", "zero_init": False, **options})
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def inspect(block, *inputs):
    (report,) = inspect_blocks(nn.Sequential(block), inputs)
    return report


def image(count=1):
    return torch.randn(count, C, H, W, generator=torch.Generator().manual_seed(1))


def test_new_block_has_learnt_next_to_nothing():
    report = inspect(NonLocalBlock(C), image())
    assert report.relative_change == 0
    assert report.mean_abs_gamma == 0
    assert report.effective_norm == 0
    assert report.out_weight_norm > 0
    assert "less than 0.1 %" in report.sentence()
    assert "learnt next to nothing" in report.sentence()


def test_change_is_relative_to_the_input():
    block, x = make_block(), image()
    with torch.no_grad():
        expected = (block(x) - x).norm() / x.norm()
    report = inspect(block, x)
    assert report.relative_change == pytest.approx(expected.item(), rel=1e-5)
    assert f"{100 * expected:.1f} %" in report.sentence()


def mean_distance(maps):
    """Of the pairs of different rows that are not zero."""
    maps = [row for row in maps if row.any()]
    distances = [
        (1 - torch.cosine_similarity(maps[i], maps[j], dim=0).item()) / 2
        for i in range(len(maps))
        for j in range(i)
    ]
    return sum(distances) / len(distances)


@pytest.mark.parametrize("subsample", ["none", "embeddings", "pyramid"])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_entropy_and_query_dependence_are_their_formulas(pairwise, subsample):
    block, x = make_block(pairwise=pairwise, subsample=subsample), image(count=2)
    maps = block.attention(x, range(H * W)).detach().flatten(2).double()
    report = inspect(block, x)
    expected = sum(map(mean_distance, maps)) / len(maps)
    assert report.query_dependence == pytest.approx(expected, rel=1e-5)
    if pairwise in ("gaussian", "embedded_gaussian", "disentangled"):
        maps = maps / maps.sum(2, keepdim=True)
        entropy = -(maps * maps.log()).sum(2).mean() / math.log(maps.shape[2])
        assert report.attention_entropy == pytest.approx(entropy.item(), rel=1e-5)
        places = (-(maps * maps.log()).sum(2)).exp().mean()
        assert report.attended_share == pytest.approx(places.item() / maps.shape[2], rel=1e-5)
    else:
        assert report.attended_share is None
        assert report.attention_entropy is None
        assert "no distribution" in report.sentence()


def test_maps_of_zeros_are_left_out():
    block = make_block(pairwise="concatenation")
    x = image()
    with torch.no_grad():
        maps = block.attention(x, range(H * W))[0].flatten(1)
        # Shifts all a_i + b_j by the same number, so that few queries have anything active.
        shift = maps.max(1).values.sort().values[-3] * maps.shape[1]
        w_phi = block.concat.weight[0, block.phi.out_channels :].flatten()
        block.phi.bias -= shift * w_phi / w_phi.square().sum()
        maps = block.attention(x, range(H * W))[0].flatten(1).double()
    assert 2 <= maps.any(1).sum() < H * W
    assert inspect(block, x).query_dependence == pytest.approx(mean_distance(maps), rel=1e-5)


def test_attention_to_everything_alike():
    block = make_block(pairwise="embedded_gaussian")
    nn.init.zeros_(block.theta.weight)
    nn.init.zeros_(block.theta.bias)
    report = inspect(block, image())
    assert report.attention_entropy == pytest.approx(1)
    assert report.query_dependence == pytest.approx(0, abs=1e-6)
    assert "everything nearly alike" in report.sentence()
    assert "a global context block would do (GCNet)" in report.sentence()


def test_attention_of_each_query_to_itself():
    block = NonLocalBlock(4, pairwise="gaussian", scale=False, norm="", zero_init=False)
    x = 30 * torch.eye(4).view(1, 4, 2, 2)
    report = inspect(block, x)
    assert report.attention_entropy == pytest.approx(0, abs=1e-6)
    assert report.query_dependence == pytest.approx(0.5)
    nn.init.constant_(block.out.weight, 1)
    sentence = inspect(block, x).sentence()
    assert "it attends to 25 % of the places;" in sentence
    assert "different queries attend to different places" in sentence


def test_global_context():
    torch.manual_seed(0)
    block, x = GlobalContextBlock(C, reduction=2, zero_init=False), image(count=2)
    report = inspect(block, x)
    assert report.query_dependence == pytest.approx(0, abs=1e-6)
    maps = block.attention(x, [0]).detach().flatten(1).double()
    entropy = -(maps * maps.log()).sum(1).mean() / math.log(H * W)
    assert report.attention_entropy == pytest.approx(entropy.item(), rel=1e-5)
    assert report.mean_abs_gamma is None
    assert report.effective_norm == report.out_weight_norm > 0
    assert "all queries attend to the same places, as it is made to" in report.sentence()
    assert report.pairwise == "global_context"


def test_norm_is_folded_into_the_effective_weights():
    block = make_block(norm="BN").eval()
    nn.init.uniform_(block.norm.running_var, 0.5, 2)
    folded = fuse_conv_bn_eval(block.out, block.norm)
    report = inspect(block, image())
    assert report.effective_norm == pytest.approx(folded.weight.norm().item(), rel=1e-5)
    assert report.mean_abs_gamma == pytest.approx(block.norm.weight.abs().mean().item())
    assert report.out_weight_norm == pytest.approx(block.out.weight.norm().item())


def test_weights_that_are_computed_at_each_call_are_those_of_the_next_one():
    block = make_block(norm="BN")
    prune.identity(block.out, "weight")
    before = inspect(block)
    nn.init.zeros_(block.out.weight_orig)
    after = inspect(block)
    assert before.effective_norm > 0
    assert after.effective_norm == after.out_weight_norm == 0


@pytest.mark.parametrize(("norm", "has_gamma", "folds"), [("", False, True), ("LN", True, False)])
def test_what_a_norm_has_not_is_none(norm, has_gamma, folds):
    report = inspect(make_block(norm=norm), image())
    assert (report.mean_abs_gamma is not None) == has_gamma
    assert (report.effective_norm is not None) == folds


def test_head_that_is_given_no_regions():
    report = inspect(make_block(), image(count=0))
    assert report.relative_change is report.attention_entropy is report.query_dependence is None
    assert report.out_weight_norm > 0
    assert "given nothing" in report.sentence()


def test_a_single_position_has_neither_entropy_nor_pairs():
    report = inspect(make_block(), image()[:, :, :1, :1])
    assert report.relative_change > 0
    assert report.attention_entropy is report.query_dependence is None


def test_inputs_are_averaged_and_empty_ones_left_out():
    block, x = make_block(), image()
    each = [inspect(block, x), inspect(block, 5 * x)]
    both = inspect(block, x, image(count=0), 5 * x)
    for field in ("relative_change", "attention_entropy", "query_dependence"):
        values = [getattr(report, field) for report in each]
        assert values[0] != pytest.approx(values[1], rel=1e-3)
        assert getattr(both, field) == pytest.approx(sum(values) / 2)


def test_is_in_evaluation_mode_and_leaves_the_model_as_it_was():
    model = nn.Sequential(make_block(norm="BN")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inspect_blocks(model, [image()])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_block_is_reported_by_its_full_name():
    model = nn.Sequential(
        nn.Identity(), nn.Sequential(make_block(), make_block(pairwise="gaussian"))
    )
    reports = inspect_blocks(model, [image()])
    assert [(r.block, r.pairwise) for r in reports] == [
        ("1.0", "embedded_gaussian"),
        ("1.1", "gaussian"),
    ]
    assert inspect_blocks(nn.Sequential(nn.Identity()), [image()]) == []
