"""Blocks of mmcv, PyTorchVideo and timm, as installed: converted, they compute the same."""

import itertools

import pytest
import torch
from torch import nn

from nl_detectron.weights import ConversionError, convert
from tests.layers.reference import PAIRWISE
from tests.weights.blocks import check_equal, our_block, random_input, randomize

CHANNELS = 32


def mmcv_block(dims=2, channels=CHANNELS, **options):
    non_local = pytest.importorskip("mmcv.cnn.bricks.non_local")
    return randomize(getattr(non_local, f"NonLocal{dims}d")(channels, **options))


def pytorchvideo_block(pool=True, instantiation="softmax", **options):
    non_local = pytest.importorskip("pytorchvideo.layers.nonlocal_net")
    return randomize(
        non_local.create_nonlocal(
            dim_in=CHANNELS,
            dim_inner=16,
            pool_size=(1, 2, 2) if pool else None,
            instantiation=instantiation,
            **options,
        )
    )


@pytest.mark.parametrize(
    ("mode", "dims", "pool", "norm"),
    itertools.product(PAIRWISE, (1, 2, 3), (False, True), (None, "BN")),
)
def test_mmcv(mode, dims, pool, norm):
    norm_cfg = norm and {"type": f"{norm}{dims}d"}
    theirs = mmcv_block(dims, mode=mode, sub_sample=pool, norm_cfg=norm_cfg)
    said = {"pairwise": mode, "scale": True} if mode == "embedded_gaussian" else {"pairwise": mode}
    result = convert(theirs.state_dict(), dims=dims, **said)
    assert result.family == "mmcv"
    assert result.settings["MODEL"]["NONLOCAL"]["SUBSAMPLE"] == ("embeddings" if pool else "none")
    check_equal(our_block(result, dims), theirs, random_input(dims, CHANNELS))

    # Here the names tell less than mmcv's do.
    said.update(subsample="embeddings" if pool else "none")
    if mode == "gaussian":
        said.update(scale=False)
    back = convert(result.state_dict, to="mmcv", **said)
    assert_same(back.state_dict, theirs.state_dict())


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("reduction", [1, 2, 3, 32])
@pytest.mark.parametrize("norm", ["SyncBN", "GN"])
def test_mmcv_options(use_scale, reduction, norm):
    norm_cfg = {"type": "GN", "num_groups": 32} if norm == "GN" else {"type": "BN"}
    theirs = mmcv_block(channels=64, reduction=reduction, use_scale=use_scale, norm_cfg=norm_cfg)
    said = {"pairwise": "embedded_gaussian", "scale": use_scale, "norm": norm}
    result = convert(theirs.state_dict(), **said)
    node = result.settings["MODEL"]["NONLOCAL"]
    assert (node["SCALE"], node["NORM"]) == (use_scale, norm)
    check_equal(our_block(result), theirs, random_input(2, 64))
    back = convert(result.state_dict, to="mmcv", subsample="none", **said)
    assert_same(back.state_dict, theirs.state_dict())
    (arguments,) = back.settings.values()
    del arguments["type"]
    rebuilt = mmcv_block(channels=arguments.pop("in_channels"), **arguments)
    rebuilt.load_state_dict(back.state_dict)
    check_equal(rebuilt, theirs, random_input(2, 64))


def test_mmcv_bias_of_ours_goes_into_the_mean():
    theirs = mmcv_block(norm_cfg={"type": "BN"})
    said = {"pairwise": "dot_product", "subsample": "none"}
    ours = our_block(convert(theirs.state_dict(), pairwise="dot_product"))
    nn.init.normal_(ours.out.bias)
    back = convert(ours.state_dict(), to="mmcv", **said)
    theirs.mode = "dot_product"
    theirs.load_state_dict(back.state_dict)
    check_equal(ours, theirs, random_input(2, CHANNELS))
    assert "norm's mean" in back.table()


@pytest.mark.parametrize("instantiation", ["softmax", "dot_product"])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm3d, None])
@pytest.mark.parametrize("dims", [2, 3])
def test_pytorchvideo(instantiation, pool, norm, dims):
    theirs = pytorchvideo_block(pool, instantiation, norm=norm)
    said = {
        "pairwise": "dot_product" if instantiation == "dot_product" else "embedded_gaussian",
        "subsample": "input" if pool else "none",
    }
    result = convert(theirs.state_dict(), dims=dims, **said)
    assert result.family == "pytorchvideo"
    x = random_input(dims, CHANNELS)
    frame_by_frame = theirs if dims == 3 else OneFrame(theirs)
    check_equal(our_block(result, dims), frame_by_frame, x)

    back = convert(result.state_dict, to="pytorchvideo", scale=True, **said)
    assert_same(back.state_dict, theirs.state_dict())
    (arguments,) = back.settings.values()
    rebuilt = pytest.importorskip("pytorchvideo.layers.nonlocal_net").create_nonlocal(**arguments)
    rebuilt.load_state_dict(back.state_dict)
    check_equal(rebuilt.eval(), theirs, random_input(3, CHANNELS))


def test_pytorchvideo_takes_blocks_without_scale():
    mmcv = mmcv_block(3, use_scale=False)
    said = {"pairwise": "embedded_gaussian", "scale": False}
    back = convert(mmcv.state_dict(), to="pytorchvideo", **said)
    theirs = pytorchvideo_block(pool=False, norm=None)
    theirs.load_state_dict(back.state_dict)
    check_equal(theirs, mmcv, random_input(3, CHANNELS))


@pytest.mark.parametrize("eps", [1e-3, 1e-6])
def test_another_epsilon(eps):
    theirs = pytorchvideo_block(norm_eps=eps)
    with torch.no_grad():
        theirs.norm.running_var.copy_(torch.logspace(-4, 0, CHANNELS))
    said = {"pairwise": "embedded_gaussian", "subsample": "input", "dims": 3}
    result = convert(theirs.state_dict(), norm_eps=eps, **said)
    check_equal(our_block(result, 3), theirs, random_input(3, CHANNELS))
    assert "norm.running_var" in result.state_dict
    theirs.norm.running_var.zero_()
    if eps < 1e-5:
        with pytest.raises(ConversionError, match="variance would be negative"):
            convert(theirs.state_dict(), norm_eps=eps, **said)


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("ratio", [1 / 8, 1 / 2])
def test_timm(use_scale, ratio):
    layers = pytest.importorskip("timm.layers.non_local_attn")
    theirs = randomize(layers.NonLocalAttn(64, use_scale=use_scale, rd_ratio=ratio))
    result = convert(theirs.state_dict(), scale=use_scale)
    assert result.family == "timm"
    check_equal(our_block(result), theirs, random_input(2, 64))
    assert not result.notes or "scale" not in result.notes[0]
    if use_scale:
        assumed = convert(theirs.state_dict())
        assert "does not say scale; assumed" in assumed.notes[0]
        torch.testing.assert_close(assumed.state_dict, result.state_dict)


class OneFrame(nn.Module):
    """A 3-D block on images."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x.unsqueeze(2)).squeeze(2)


def assert_same(actual, expected):
    """Equal bit for bit, whatever the order."""
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
