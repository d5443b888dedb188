import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone
from torch import nn

from nl_detectron import (
    NonLocalBlock,
    add_nonlocal_config,
    insert_blocks,
    insert_nonlocal_blocks,
)


def build(name="build_resnet_backbone", *overrides):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(list(overrides))
    torch.manual_seed(0)
    return build_backbone(cfg, ShapeSpec(channels=3))


def resnet(depth=18, *overrides):
    narrow = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 16]
    return build("build_resnet_backbone", "MODEL.RESNETS.DEPTH", depth, *narrow, *overrides)


def names(module):
    return [name for name, _ in module.named_children()]


def test_names_stay_and_order_is_right():
    backbone = resnet(50)
    before = set(backbone.state_dict())
    returned = insert_nonlocal_blocks(backbone, {"res4": [-2]})
    assert returned is backbone
    assert names(backbone.res4) == ["0", "1", "2", "3", "4", "nonlocal4", "5"]
    new = set(backbone.state_dict()) - before
    assert before < set(backbone.state_dict())
    assert all(key.startswith("res4.nonlocal4.") for key in new)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth(depth):
    blocks = {18: 2, 34: 6, 50: 6, 101: 23, 152: 36}[depth]
    backbone = insert_nonlocal_blocks(resnet(depth), {"res4": [-2], "res5": [0, -1]})
    assert names(backbone.res4)[-2] == f"nonlocal{blocks - 2}"
    assert names(backbone.res5)[1] == "nonlocal0"
    assert isinstance(backbone.res5[-1], NonLocalBlock)
    assert backbone.res4.get_submodule(f"nonlocal{blocks - 2}").in_channels == 256


def test_the_block_takes_part_in_forward():
    plain = resnet()
    modified = insert_nonlocal_blocks(copy.deepcopy(plain), {"res4": [-2]}, zero_init=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before, after = plain.eval()(x), modified.eval()(x)
    for stage in ("res2", "res3"):
        assert torch.equal(before[stage], after[stage])
    for stage in ("res4", "res5"):
        assert not torch.equal(before[stage], after[stage])
    # ... at its place: the stage is the plain one with the block in between.
    x = before["res3"]
    expected = plain.res4[1](modified.res4.nonlocal0(plain.res4[0](x)))
    assert torch.equal(after["res4"], expected)


@pytest.mark.parametrize(
    "name", ["build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"]
)
def test_reaches_through_fpn(name):
    fpn = insert_nonlocal_blocks(build(name), {"res3": [0], "res4": [-2]})
    assert names(fpn.bottom_up.res3)[1] == "nonlocal0"
    assert names(fpn.bottom_up.res4)[-2] == "nonlocal4"


def test_resnext_and_dilated_c5():
    backbone = resnet(
        50, "MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
        "MODEL.RESNETS.RES5_DILATION", 2,
    )  # fmt: skip
    insert_nonlocal_blocks(backbone, {"res5": [-2]})
    assert backbone(torch.zeros(1, 3, 64, 64))["res5"].shape == (1, 512, 4, 4)


def test_regnet():
    regnet = pytest.importorskip("detectron2.modeling.backbone.regnet")
    backbone = regnet.RegNet(
        stem_class=regnet.SimpleStem, stem_width=32, block_class=regnet.ResBottleneckBlock,
        depth=9, w_a=36, w_0=24, w_m=2.5, group_width=8, norm="BN",
        out_features=["s1", "s2", "s3", "s4"],
    )  # fmt: skip
    before = list(backbone.state_dict())
    x = torch.randn(1, 3, 64, 64)
    expected = backbone.eval()(x)
    insert_nonlocal_blocks(backbone, {"s4": [-1], "s3": [0]}).eval()
    assert names(backbone.s3)[:2] == ["b1", "nonlocal0"]
    assert [key for key in backbone.state_dict() if "nonlocal" not in key] == before
    actual = backbone(x)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


class OwnBackbone(Backbone):
    """A backbone of a user's own, with plain nn.Sequential stages."""

    def __init__(self, block=nn.Conv2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1))
        self.first = nn.Sequential(block(8, 8, 1), block(8, 8, 1))
        self._out_features, self._out_feature_channels = ["first"], {"first": 8}
        self._out_feature_strides = {"first": 1}

    def forward(self, x):
        return {"first": self.first(self.stem(x))}


def test_own_backbone_through_the_registry():
    name = "build_own_backbone_for_test"
    if name not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY._do_register(name, lambda cfg, shape: OwnBackbone())
    backbone = build(
        "build_nonlocal_backbone",
        *("MODEL.NONLOCAL.BACKBONE", name, "MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE", [[0]]),
    )
    assert names(backbone.first) == ["0", "nonlocal0", "1"]


def test_refuses_blocks_whose_channels_nobody_knows():
    class Nameless(nn.Module):
        def __init__(self, *_):
            super().__init__()

    with pytest.raises(
        ValueError, match=r"after first.0 \(a Nameless\) are not known: .* does not"
    ):
        insert_nonlocal_blocks(OwnBackbone(Nameless), {"first": [0]})


class Branches(CNNBlockBase):
    """As TridentNet's blocks: a list of tensors between the blocks of a stage."""

    def __init__(self, concat_output):
        super().__init__(8, 8, 1)
        self.concat_output = concat_output

    def forward(self, x):
        x = x if isinstance(x, list) else [x] * 3
        return torch.cat(x) if self.concat_output else x


def test_refuses_places_between_blocks_that_give_lists():
    backbone = nn.Module()
    backbone.res4 = nn.Sequential(Branches(False), Branches(False), Branches(True))
    with pytest.raises(ValueError, match=r"index -2 in res4: a Branches gives a list of tensors"):
        insert_nonlocal_blocks(backbone, {"res4": [-2]})
    insert_nonlocal_blocks(backbone, {"res4": [-1]})
    assert backbone.res4(torch.ones(1, 8, 2, 2)).shape == (3, 8, 2, 2)


def test_refuses_a_backbone_without_stages():
    class NoStages(Backbone):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1)])

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"NoStages has no stages.*layers"):
        insert_nonlocal_blocks(NoStages(), {"layers": [0]})


@pytest.mark.parametrize(
    ("after_blocks", "options", "message"),
    [
        ({"res6": [0]}, {}, "stage is 'res6'.*'res2', 'res3', 'res4', 'res5'"),
        ({"Res4": [0]}, {}, "did you mean 'res4'"),
        ({"res4": [2]}, {}, "block index 2 in res4: res4 has 2 blocks.*-2 to 1"),
        ({"res4": [-3]}, {}, "block index -3 in res4"),
        ({"res4": ["0"]}, {}, "block index '0' in res4"),
        ({"res4": [True]}, {}, "block index True in res4"),
        ({"res4": -2}, {}, "res4 is given -2.*a list"),
        ({"res4": [0]}, {"dims": 3}, "dims is 3.*2-D"),
        ({"res4": [0, -2]}, {}, "block index -2 in res4.*already"),
        ({"res3": [0], "res4": [0]}, {"pairwise": "dot"}, "pairwise is 'dot'.*dot_product"),
    ],
)
def test_refuses_and_leaves_the_backbone_as_it_was(after_blocks, options, message):
    backbone = resnet()
    before = str(backbone)
    with pytest.raises(ValueError, match=message):
        insert_nonlocal_blocks(backbone, after_blocks, **options)
    assert str(backbone) == before


def test_second_call_counts_residual_blocks_only():
    backbone = insert_nonlocal_blocks(resnet(50), {"res3": [0]})
    insert_nonlocal_blocks(backbone, {"res3": [1]})
    assert names(backbone.res3) == ["0", "nonlocal0", "1", "nonlocal1", "2", "3"]
    with pytest.raises(ValueError, match="already"):
        insert_nonlocal_blocks(backbone, {"res3": [0]})


@pytest.mark.parametrize("freeze_at", [0, 2, 3, 4])
def test_blocks_in_frozen_stages_are_frozen(freeze_at):
    backbone = resnet(18, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    insert_nonlocal_blocks(backbone, {"res2": [0], "res3": [0], "res4": [0]})
    for number, stage in ((2, backbone.res2), (3, backbone.res3), (4, backbone.res4)):
        frozen = freeze_at >= number
        assert all(p.requires_grad != frozen for p in stage.nonlocal0.parameters())
        assert isinstance(stage.nonlocal0.norm, FrozenBatchNorm2d) == frozen


def test_freezing_afterwards():
    backbone = insert_nonlocal_blocks(resnet(), {"res4": [0]})
    backbone.freeze(4)
    assert not any(p.requires_grad for p in backbone.res4.nonlocal0.parameters())


def test_blocks_take_dtype_device_and_mode_of_their_stage():
    backbone = insert_nonlocal_blocks(resnet().double().eval(), {"res4": [0]})
    assert backbone.res4.nonlocal0.g.weight.dtype == torch.float64
    assert not backbone.res4.nonlocal0.training


def test_blocks_are_detectron2_blocks():
    backbone = insert_nonlocal_blocks(resnet(), {"res4": [0]})
    assert all(isinstance(block, CNNBlockBase) for block in backbone.res4)


def test_refuses_one_block_for_every_place():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 1))
    with pytest.raises(ValueError, match="make_block is a NonLocalBlock, but must make one of"):
        insert_blocks(backbone, ["0"], NonLocalBlock(8))
