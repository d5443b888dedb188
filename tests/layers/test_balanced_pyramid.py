"""Libra R-CNN's balanced feature pyramid, against Section 3.2 of its paper in float64."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from nl_detectron import NonLocalBlock, add_nonlocal_config
from nl_detectron.layers import BalancedPyramid
from nl_detectron.modeling import nonlocal_blocks

SIZES = {"p2": (16, 24), "p3": (8, 12), "p4": (4, 6), "p5": (2, 3), "p6": (1, 2)}


def resized(x, size):
    """Cell by cell: the largest value that it covers, or the value of the cell that it lies in."""
    rows, columns = x.shape[2:]
    y = x.new_empty(*x.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            if rows >= size[0]:
                top, bottom = i * rows // size[0], -(-(i + 1) * rows // size[0])
                left, right = j * columns // size[1], -(-(j + 1) * columns // size[1])
                y[:, :, i, j] = x[:, :, top:bottom, left:right].amax((2, 3))
            else:
                y[:, :, i, j] = x[:, :, i * rows // size[0], j * columns // size[1]]
    return y


def embedded_gaussian(x, block):
    """Equation 1 of the non-local paper with a softmax, no scale: what refines there."""
    theta, phi, g = (conv(x).flatten(2) for conv in (block.theta, block.phi, block.g))
    weights = (theta.transpose(1, 2) @ phi).softmax(2)
    y = (weights @ g.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
    return x + block.out(y)


def test_is_the_papers():
    torch.manual_seed(0)
    block = NonLocalBlock(8, reduction=1, scale=False, norm="", zero_init=False).double()
    nn.init.normal_(block.out.weight)
    levels = {name: torch.randn(2, 8, *size).double() for name, size in SIZES.items()}
    mean = sum(resized(x, SIZES["p4"]) for x in levels.values()) / len(levels)  # equation 4
    refined = embedded_gaussian(mean, block)
    actual = BalancedPyramid(block, "p4")(levels)
    assert list(actual) == list(levels)
    for name, x in levels.items():
        torch.testing.assert_close(actual[name], x + resized(refined, SIZES[name]))


def build(*overrides):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_balanced_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    options = ("REDUCTION", 1, "SCALE", False, "SUBSAMPLE", "none", "NORM", "")
    keys = [f"MODEL.NONLOCAL.{o}" if isinstance(o, str) and o.isupper() else o for o in options]
    cfg.merge_from_list([*keys, *overrides])
    torch.manual_seed(0)
    return build_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("retina", [False, True])
def test_the_backbone_is_any_fpn_with_all_its_keys(retina):
    name = "build_retinanet_resnet_fpn_backbone" if retina else "build_resnet_fpn_backbone"
    features = ["res3", "res4", "res5"] if retina else ["res2", "res3", "res4", "res5"]
    overrides = ["MODEL.NONLOCAL.BACKBONE", name, "MODEL.FPN.IN_FEATURES", features]
    balanced, plain = build(*overrides), build("MODEL.BACKBONE.NAME", name, *overrides)
    new = balanced.state_dict().keys() - plain.state_dict().keys()
    assert all(key.startswith("nonlocal.refine.") for key in new)
    assert plain.state_dict().keys() < balanced.state_dict().keys()
    assert type(balanced) is type(plain)
    (block,) = nonlocal_blocks(balanced).values()
    assert isinstance(block, NonLocalBlock)
    x = torch.randn(1, 3, 64, 128)
    levels, outputs = plain.eval()(x), balanced.eval()(x)
    assert {k: v.shape for k, v in levels.items()} == {k: v.shape for k, v in outputs.items()}
    # W_z is zero at first: each level gets the mean of all, at p4's size.
    mean = sum(resized(level, levels["p4"].shape[2:]) for level in levels.values()) / len(levels)
    for level, output in outputs.items():
        added = output - levels[level]
        assert torch.allclose(added, resized(mean, added.shape[2:]), atol=1e-5), level
    sum(output.square().sum() for output in outputs.values()).backward()
    assert block.out.weight.grad.any()


def test_refuses_what_is_no_fpn():
    with pytest.raises(ValueError, match=r"BACKBONE is 'build_resnet_backbone'.*\[64, 128, 256"):
        build("MODEL.NONLOCAL.BACKBONE", "build_resnet_backbone")
    with pytest.raises(ValueError, match=r"MODEL.NONLOCAL.BACKBONE is 'build_nonlocal_backbone'"):
        build("MODEL.NONLOCAL.BACKBONE", "build_nonlocal_backbone")
