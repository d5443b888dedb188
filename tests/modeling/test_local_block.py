import pytest
import torch
from detectron2.modeling import build_backbone
from fvcore.nn import FlopCountAnalysis

from nl_detectron import NonLocalBlock, model_zoo
from nl_detectron.analysis.flops import flop_handles
from nl_detectron.layers import LocalBlock
from nl_detectron.modeling import nonlocal_blocks

STUDY_GRID = (2, 16)  # res4 of a picture of the long-range datasets


def config(*overrides):
    cfg = model_zoo.get_config("long_range")
    cfg.MODEL.NONLOCAL.BLOCK = "LocalBlock"
    cfg.merge_from_list(list(overrides))
    return cfg


def local_blocks(model):
    return nonlocal_blocks(model, LocalBlock)


def cost(block, grid):
    """Parameters, and multiply-adds for one image."""
    block = block.eval().requires_grad_(False)
    x = torch.randn(1, block.in_channels, *grid)
    flops = FlopCountAnalysis(block, x).set_op_handle(**flop_handles())
    flops.unsupported_ops_warnings(False)
    return sum(p.numel() for p in block.parameters()), flops.total()


@pytest.mark.parametrize(("channels", "grid"), [(256, STUDY_GRID), (1024, (4, 16))])
def test_costs_what_a_nonlocal_block_costs(channels, grid):
    nonlocal_block = NonLocalBlock(channels, subsample="embeddings", zero_init=False)
    nonlocal_block.g.register_forward_hook(lambda *_: None)  # else theta and W_z go into few keys
    expected = cost(nonlocal_block, grid)
    assert cost(LocalBlock(channels, zero_init=False), grid) == pytest.approx(expected, rel=0.02)


def test_is_local():
    block = LocalBlock(64, zero_init=False).eval()
    x = torch.randn(1, 64, 9, 9, requires_grad=True)
    block(x)[..., 4, 4].sum().backward()
    reached = x.grad[0].abs().sum(0) > 0
    assert reached[3:6, 3:6].all()
    assert reached.sum() == 9


@pytest.mark.parametrize("norm", ["BN", "GN", "FrozenBN", ""])
def test_zero_init_starts_as_the_identity_and_learns(norm):
    block = LocalBlock(64, norm=norm)
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(block(x), x)
    block(x).pow(2).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("norm", ["BN", "GN", "FrozenBN", ""])
def test_without_zero_init_adds_something(norm):
    x = torch.randn(2, 64, 4, 4)
    assert not torch.allclose(LocalBlock(64, norm=norm, zero_init=False)(x), x, atol=0.1)


def test_backbone_has_them_in_the_places_of_the_nonlocal_blocks():
    overrides = ["MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE", [[], [1], [-2]]]
    backbone = build_backbone(config(*overrides, "MODEL.NONLOCAL.NORM", "GN"))
    nonlocal_backbone = build_backbone(config(*overrides, "MODEL.NONLOCAL.BLOCK", "NonLocalBlock"))
    blocks = local_blocks(backbone)
    assert list(blocks) == ["bottom_up.res3.nonlocal1", "bottom_up.res4.nonlocal0"]
    assert all(isinstance(block.norm, torch.nn.GroupNorm) for block in blocks.values())
    assert [name for name, _ in backbone.bottom_up.res4.named_children()] == ["0", "nonlocal0", "1"]
    others = [
        {name for name in model.state_dict() if "nonlocal" not in name}
        for model in (backbone, nonlocal_backbone)
    ]
    assert others[0] == others[1]


def test_backbone_obeys_zero_init_and_freezing():
    (block,) = local_blocks(build_backbone(config("MODEL.NONLOCAL.ZERO_INIT", True))).values()
    assert not block.norm.weight.any()
    (block,) = local_blocks(build_backbone(config())).values()
    assert block.norm.weight.all()
    assert all(p.requires_grad for p in block.parameters())
    (block,) = local_blocks(build_backbone(config("MODEL.BACKBONE.FREEZE_AT", 4))).values()
    assert not any(p.requires_grad for p in block.parameters())


def test_backbone_checks_the_config():
    with pytest.raises(ValueError, match=r"MODEL\.NONLOCAL\.NORM is 'BM'"):
        build_backbone(config("MODEL.NONLOCAL.NORM", "BM"))
