"""The registry of blocks, and what is asked about the blocks of a model."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from nl_detectron import (
    GlobalContextBlock,
    NonLocalBlock,
    add_nonlocal_config,
    insert_blocks,
)
from nl_detectron.engine import scale_block_lr
from nl_detectron.layers import LocalBlock
from nl_detectron.modeling import (
    NONLOCAL_BLOCK_REGISTRY,
    build_block,
    mean_abs_gamma,
    nonlocal_blocks,
    out_weight_norm,
)


@NONLOCAL_BLOCK_REGISTRY.register()
class SignOfTest(CNNBlockBase):
    """A block of a user's own."""

    def __init__(self, cfg, in_channels):
        super().__init__(in_channels, in_channels, stride=1)
        self.gain = nn.Parameter(torch.tensor(float(cfg.MODEL.NONLOCAL.REDUCTION)))

    def forward(self, x):
        return x + self.gain * x.sign()


def config(*overrides):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_nonlocal_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(list(overrides))
    return cfg


@pytest.mark.parametrize(
    ("name", "block_class"),
    [
        ("NonLocalBlock", NonLocalBlock),
        ("GlobalContextBlock", GlobalContextBlock),
        ("LocalBlock", LocalBlock),
        ("SignOfTest", SignOfTest),
    ],
)
def test_the_config_chooses_the_kind_of_block(name, block_class):
    cfg = config("MODEL.NONLOCAL.BLOCK", name)
    assert type(build_block(cfg, 64)) is block_class
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    blocks = nonlocal_blocks(backbone)
    assert list(blocks) == ["bottom_up.res4.nonlocal0"]
    assert type(blocks["bottom_up.res4.nonlocal0"]) is block_class
    assert nonlocal_blocks(backbone, block_class) == blocks
    assert backbone(torch.zeros(1, 3, 64, 64))["p4"].shape == (1, 256, 4, 4)


def test_a_block_of_ones_own_reads_the_config():
    cfg = config("MODEL.NONLOCAL.BLOCK", "SignOfTest", "MODEL.NONLOCAL.REDUCTION", 3)
    assert build_block(cfg, 64).gain == 3


def test_a_registered_block_takes_a_config_or_its_own_arguments():
    make = NONLOCAL_BLOCK_REGISTRY.get("NonLocalBlock")
    assert make(config("MODEL.NONLOCAL.PAIRWISE", "gaussian"), 64).pairwise == "gaussian"
    assert make(64, pairwise="dot_product").pairwise == "dot_product"


def test_refuses_an_unknown_kind_and_names_the_nearest():
    with pytest.raises(ValueError, match=r"MODEL.NONLOCAL.BLOCK is 'LocalBlok'.*'LocalBlock'\?"):
        build_block(config("MODEL.NONLOCAL.BLOCK", "LocalBlok"), 64)


def test_an_error_of_another_kind_keeps_its_words():
    cfg = config("MODEL.NONLOCAL.NORM", "GN")
    with pytest.raises(ValueError, match=r'^MODEL.NONLOCAL.NORM "GN" has 32 groups.* 48 channels'):
        build_block(cfg, 48)


def test_a_global_context_block_follows_the_config():
    words = "MODEL.NONLOCAL.BLOCK", "GlobalContextBlock", "MODEL.NONLOCAL.REDUCTION"
    block = build_block(config(*words, 16), 64)
    assert block.reduce.out_channels == 4
    assert not block.out.weight.any()
    assert build_block(config(*words, 16, "MODEL.NONLOCAL.ZERO_INIT", False), 64).out.weight.any()
    with pytest.raises(ValueError, match=r"MODEL.NONLOCAL.REDUCTION is 33, .* 32"):
        build_block(config(*words, 33), 64)


@pytest.mark.parametrize("after_blocks", [{"res4": [-2]}, [[], [], [-2]], [[], [], [-2], [], []]])
def test_insert_blocks_by_name_or_by_position(after_blocks):
    cfg = config("MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE", [[], [], [], []])
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    insert_blocks(backbone, after_blocks, lambda channels: SignOfTest(cfg, channels))
    assert list(nonlocal_blocks(backbone)) == ["bottom_up.res4.nonlocal0"]


def test_blocks_are_found_by_their_class_too():
    blocks = NonLocalBlock(8), GlobalContextBlock(8, reduction=4), LocalBlock(8)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), *blocks)
    assert list(nonlocal_blocks(model)) == ["1", "2"]


def test_what_a_block_does_not_have_is_none():
    block = NonLocalBlock(8, norm="", zero_init=False)
    assert mean_abs_gamma(block) is None
    assert out_weight_norm(block) == pytest.approx(block.out.weight.norm().item())
    assert out_weight_norm(LocalBlock(8)) is None
    assert mean_abs_gamma(LocalBlock(8)) == 0
    context = GlobalContextBlock(8, reduction=2)  # whose norm is not after out
    assert mean_abs_gamma(context) is None
    assert out_weight_norm(context) == 0


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_the_norm_of_weights_is_that_of_the_next_call(bias):
    block = NonLocalBlock(8, zero_init=False)
    nn.init.constant_(block.out.bias, bias)
    prune.l1_unstructured(block.out, "weight", 0.5)
    nn.init.ones_(block.out.weight_orig)  # from it the weight is computed at each call
    assert out_weight_norm(block) == pytest.approx(4)
    assert block.training
    assert block.out.training


def test_the_own_block_of_the_readme():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "MyBlock" in c]
    if "MyBlock" not in NONLOCAL_BLOCK_REGISTRY:
        exec(code, {"__name__": __name__})  # what a reader pastes
    plain = build_backbone(
        config("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"), ShapeSpec(channels=3)
    )
    places = "MODEL.NONLOCAL.AFTER_MODULES", ["fpn_output4"]
    cfg = config("MODEL.NONLOCAL.BLOCK", "MyBlock", *places)
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    assert list(nonlocal_blocks(backbone)) == ["fpn_output4.nonlocal", "bottom_up.res4.nonlocal0"]
    backbone.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    expected, actual = plain.eval()(x), backbone.eval()(x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    actual["p4"].square().sum().backward()
    rates = scale_block_lr([{"params": backbone.parameters(), "lr": 1.0}], backbone, 100.0, 1.0)
    for block in nonlocal_blocks(backbone).values():
        assert block.gamma.grad.any()
        assert [g["lr"] for g in rates if any(p is block.gamma for p in g["params"])] == [100]


WRAPPERS = [lambda block: block, checkpoint_wrapper, torch.compile]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_blocks_are_found_once_and_as_what_they_are(wrap):
    block = GlobalContextBlock(8, reduction=2)
    stage = nn.Sequential(nn.Conv2d(8, 8, 1))
    stage.add_module("nonlocal0", wrap(block))
    assert list(nonlocal_blocks(stage).items()) == [("nonlocal0", block)]
    groups = scale_block_lr([{"params": stage.parameters(), "lr": 1.0}], stage, 100.0, 3.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in block.parameters()} == {3}
    assert {rates[id(p)] for p in stage[0].parameters()} == {1}
