"""The implementations that cannot be installed, by hand-made weights with their names."""

import itertools

import numpy as np
import pytest
import torch

from nl_detectron.weights import ConversionError, convert
from tests.layers import reference
from tests.weights.blocks import check_equal, our_block, random_input, randomize

CHANNELS, INNER = 32, 16


def conv(generator, out_channels, in_channels, dims, dtype=np.float32):
    weight = generator.normal(0, in_channels**-0.5, (out_channels, in_channels, *[1] * dims))
    return weight.astype(dtype), generator.normal(0, 0.5, out_channels).astype(dtype)


def norm(generator, channels=CHANNELS, dtype=np.float32):
    """Scale, shift, mean, variance."""
    values = [generator.normal(0, 0.5, channels) for _ in range(3)]
    return [v.astype(dtype) for v in (*values, generator.uniform(0.5, 2, channels))]


def caffe2_block(prefix, with_norm="bn", with_bias=True):
    generator = np.random.default_rng(0)
    blobs = {}
    for part in ("theta", "phi", "g", "out"):
        shape = (CHANNELS, INNER) if part == "out" else (INNER, CHANNELS)
        weight, bias = conv(generator, *shape, dims=3)
        blobs[f"{prefix}_{part}_w"] = weight
        if with_bias:
            blobs[f"{prefix}_{part}_b"] = bias
    leaves = {"bn": ("s", "b", "rm", "riv"), "affine": ("s", "b"), "": ()}[with_norm]
    blobs.update({f"{prefix}_bn_{leaf}": v for leaf, v in zip(leaves, norm(generator))})
    momenta = {f"{name}_momentum": np.ones_like(v) for name, v in blobs.items()}
    return {**blobs, **momenta}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("said", "pairwise", "subsample", "scale"),
    [
        ({}, "embedded_gaussian", "input", True),
        ({"pairwise": "dot_product", "subsample": "none"}, "dot_product", "none", True),
        ({"scale": False}, "embedded_gaussian", "input", False),
    ],
)
@pytest.mark.parametrize("with_norm", ["bn", "affine", ""])
def test_caffe2(dims, said, pairwise, subsample, scale, with_norm):
    prefix = "nonlocal_conv4_5"
    blobs = caffe2_block(prefix, with_norm)
    result = convert({"blobs": blobs, "lr": 0.01, "model_iter": 7}, dims=dims, **said)
    assert result.family == "caffe2"
    node = result.settings["MODEL"]["NONLOCAL"]
    assert node["AFTER_BLOCKS_PER_STAGE"] == [[], [], [5], []]
    assert node["NORM"] == {"bn": "BN", "affine": "FrozenBN", "": ""}[with_norm]

    tensors = {k: torch.from_numpy(v).double() for k, v in blobs.items()}
    parts = {"theta": "theta", "phi": "phi", "g": "g", "out": "out"}
    named = {}
    for part in parts:
        weight = tensors[f"{prefix}_{part}_w"]
        named[f"{part}.weight"] = weight.reshape(weight.shape[:2] + (1,) * dims)
        named[f"{part}.bias"] = tensors[f"{prefix}_{part}_b"]
    x = random_input(dims, CHANNELS).double()
    y = reference.block(x, named, pairwise, subsample, scale) - x
    column = (-1, *[1] * dims)
    if with_norm == "bn":
        mean, variance = (tensors[f"{prefix}_bn_{leaf}"] for leaf in ("rm", "riv"))
        y = (y - mean.reshape(column)) / (variance + 1.0000001e-5).sqrt().reshape(column)
    if with_norm:
        y = y * tensors[f"{prefix}_bn_s"].reshape(column) + tensors[f"{prefix}_bn_b"].reshape(
            column
        )
    actual = our_block(result, dims, "res4.nonlocal5.")(x.float())
    torch.testing.assert_close(actual.double(), x + y, rtol=1e-5, atol=1e-5)

    left_out = {row.source: row.note for row in result.rows if not row.target}
    assert left_out.pop("lr") == left_out.pop("model_iter") == "not a tensor"
    assert set(left_out) == {name for name in blobs if name.endswith("_momentum")}
    assert set(left_out.values()) == {"the optimizer's"}


def test_caffe2_places():
    names = [f"nonlocal_conv3_{i}" for i in (1, 3)] + [f"nonlocal_conv4_{i}" for i in (6, 13, 20)]
    blobs = {k: v for name in reversed(names) for k, v in caffe2_block(name).items()}
    result = convert(blobs, "caffe2")
    node = result.settings["MODEL"]["NONLOCAL"]
    assert node["AFTER_BLOCKS_PER_STAGE"] == [[], [1, 3], [6, 13, 20], []]
    assert node["REDUCTION"] == 2
    assert len([note for note in result.notes if "assumed" in note]) == 3
    grouped = convert(caffe2_block("nonlocal_conv3_group_1"))
    assert "res3.nonlocal1.theta.weight" in grouped.state_dict


def test_caffe2_without_biases():
    result = convert(caffe2_block("nonlocal_conv3_1", with_bias=False))
    assert not result.state_dict["res3.nonlocal1.theta.bias"].any()
    assert "zeros, as the theta of video-nonlocal-net (Caffe2) has no bias" in result.table()


class AlexHex7:
    """The equations that Non-local_pytorch computes, in float64."""

    def __init__(self, pairwise, dims, sub_sample, bn_layer):
        generator = np.random.default_rng(0)
        self.pairwise, self.sub_sample, self.bn_layer = pairwise, sub_sample, bn_layer
        pooled = ".0" if sub_sample else ""
        names = {"g": f"g{pooled}", "out": "W.0" if bn_layer else "W"}
        if pairwise != "gaussian":
            names.update(theta="theta", phi=f"phi{pooled}")
        self.convs = {}
        tensors = {}
        for part, name in names.items():
            shape = (CHANNELS, INNER) if part == "out" else (INNER, CHANNELS)
            self.convs[part] = conv(generator, *shape, dims)
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = self.convs[part]
        if bn_layer:
            self.norm = norm(generator)
            leaves = ("weight", "bias", "running_mean", "running_var")
            tensors.update({f"W.1.{leaf}": v for leaf, v in zip(leaves, self.norm)})
        if pairwise == "concatenation":
            self.w_f, _ = conv(generator, 1, 2 * INNER, 2)
            tensors["concat_project.0.weight"] = self.w_f
        self.state_dict = {k: torch.from_numpy(v) for k, v in tensors.items()}

    def apply(self, part, x):
        weight, bias = (torch.from_numpy(v).double() for v in self.convs[part])
        z = torch.einsum("oc,bc...->bo...", weight.flatten(1), x)
        return z + bias.reshape(-1, *[1] * (x.dim() - 2))

    def __call__(self, x):
        x = x.double()
        pool = reference.pool if self.sub_sample else lambda x: x
        theta, phi = x, pool(x)
        if self.pairwise != "gaussian":
            theta, phi = self.apply("theta", x), pool(self.apply("phi", x))
        f = reference.weights(
            self.pairwise,
            theta.flatten(2).mT,
            phi.flatten(2).mT,
            w_f=torch.from_numpy(self.w_f).double().flatten()
            if self.pairwise == "concatenation"
            else None,
        )
        y = f @ pool(self.apply("g", x)).flatten(2).mT
        y = self.apply("out", y.mT.unflatten(2, x.shape[2:]))
        if self.bn_layer:
            scale, shift, mean, variance = (
                torch.from_numpy(v).double().reshape(-1, *[1] * (x.dim() - 2)) for v in self.norm
            )
            y = (y - mean) / (variance + 1e-5).sqrt() * scale + shift
        return (y + x).float()


@pytest.mark.parametrize(
    ("pairwise", "dims", "sub_sample", "bn_layer"),
    itertools.product(reference.PAIRWISE, (1, 2, 3), (True, False), (True, False)),
)
def test_alexhex7(pairwise, dims, sub_sample, bn_layer):
    theirs = AlexHex7(pairwise, dims, sub_sample, bn_layer)
    result = convert(theirs.state_dict, pairwise=pairwise, dims=dims)
    assert result.family == "alexhex7"
    node = result.settings["MODEL"]["NONLOCAL"]
    assert node["SUBSAMPLE"] == ("embeddings" if sub_sample else "none")
    assert node["SCALE"] is ("gaussian" not in pairwise)
    check_equal(our_block(result, dims), theirs, random_input(dims, CHANNELS))


@pytest.mark.parametrize("norm_name", ["bn", "norm"])
def test_slowfast(norm_name):
    """Its block is PyTorchVideo's; its model's names tell the place."""
    nonlocal_net = pytest.importorskip("pytorchvideo.layers.nonlocal_net")
    theirs = randomize(
        nonlocal_net.create_nonlocal(dim_in=CHANNELS, dim_inner=INNER, pool_size=(1, 2, 2))
    )
    prefix = "s4.pathway0_nonlocal3."
    tensors = {
        f"{prefix}{name.replace('norm.', f'{norm_name}.')}": tensor
        for name, tensor in theirs.state_dict().items()
    }
    tensors["s4.pathway0_res3.branch2.a.weight"] = torch.zeros(8, 8, 3, 1, 1)
    checkpoint = {"epoch": 3, "model_state": tensors, "optimizer_state": {}}
    with pytest.raises(ConversionError, match=r"pairwise=.*SlowFast's default: 'dot_product'"):
        convert(checkpoint)
    result = convert(checkpoint, pairwise="embedded_gaussian", subsample="input", dims=3)
    assert result.family == "slowfast"
    node = result.settings["MODEL"]["NONLOCAL"]
    assert node["AFTER_BLOCKS_PER_STAGE"] == [[], [], [3], []]
    check_equal(our_block(result, 3, "res4.nonlocal3."), theirs, random_input(3, CHANNELS))
    assert {row.source for row in result.rows if not row.target} == {
        "epoch",
        "optimizer_state",
        "s4.pathway0_res3.branch2.a.weight",
    }
