"""keras-non-local-nets: arrays as Keras names them, against its equations in float64."""

import sys

import numpy as np
import pytest
import torch

from nl_detectron.weights import ConversionError, convert
from nl_detectron.weights.checkpoint_io import CheckpointError, load_checkpoint
from tests.layers import reference
from tests.weights.blocks import our_block, random_input

CHANNELS, INNER = 16, 8


def kernels(dims, first=5):
    """Those of a block's layers, between others."""
    generator = np.random.default_rng(0)
    sizes = [(CHANNELS, INNER)] * 3 + [(INNER, CHANNELS)]
    arrays = {f"conv{dims}d/kernel:0": generator.normal(size=(*[3] * dims, 3, CHANNELS))}
    for number, size in enumerate(sizes, first):
        weight = generator.normal(0, size[0] ** -0.5, (*[1] * dims, *size))
        arrays[f"conv{dims}d_{number}/kernel:0"] = weight.astype(np.float32)
    return {**arrays, "dense/kernel:0": np.ones((4, 4)), "dense/bias:0": np.ones(4)}


def expected(arrays, x, dims, pairwise, subsample):
    tensors = {}
    for number, part in enumerate(("theta", "phi", "g", "out"), 5):
        kernel = torch.from_numpy(arrays[f"conv{dims}d_{number}/kernel:0"]).double()
        weight = kernel.flatten(0, -3).squeeze(0).T.reshape(*kernel.shape[:-3:-1], *[1] * dims)
        tensors[f"{part}.weight"] = weight
        tensors[f"{part}.bias"] = torch.zeros(len(weight)).double()
    return reference.block(x.double(), tensors, pairwise, subsample, scale=False)


@pytest.mark.parametrize(
    ("dims", "pairwise", "subsample"),
    [
        (1, "embedded_gaussian", "embeddings"),
        *((dims, "embedded_gaussian", "none") for dims in (1, 2, 3)),
        *((dims, "dot_product", "none") for dims in (1, 2, 3)),
    ],
)
def test_computes_the_same(dims, pairwise, subsample):
    arrays = kernels(dims)
    said = {"pairwise": pairwise, "subsample": subsample, "dims": dims}
    result = convert(arrays, **said, rename={f"conv{dims}d_5": "res4.nonlocal4"})
    assert result.family == "keras"
    x = random_input(dims, CHANNELS)
    actual = our_block(result, dims, "res4.nonlocal4.")(x)
    torch.testing.assert_close(
        actual.double(), expected(arrays, x, dims, pairwise, subsample), rtol=1e-5, atol=1e-5
    )
    left_out = {row.source for row in result.rows if not row.target}
    assert left_out == {f"conv{dims}d/kernel:0", "dense/kernel:0", "dense/bias:0"}


@pytest.mark.parametrize(
    ("dims", "said", "message"),
    [
        (2, {"pairwise": "embedded_gaussian"}, r"does not tell subsample='none' or 'embeddings'"),
        (2, {}, r"tell pairwise='embedded_gaussian' or 'dot_product'"),
        (
            2,
            {"pairwise": "embedded_gaussian", "subsample": "embeddings"},
            r"conv2d_5: its compression pools neighbours in the flattened grid",
        ),
        (
            1,
            {"pairwise": "dot_product", "subsample": "embeddings"},
            "its dot product does not subsample",
        ),
    ],
)
def test_what_is_not_the_same_is_refused(dims, said, message):
    with pytest.raises(ConversionError, match=message):
        convert(kernels(dims), **said, dims=dims)


def test_layers_that_do_not_follow_each_other_are_no_block():
    arrays = kernels(2)
    arrays["conv2d_9/kernel:0"] = arrays.pop("conv2d_8/kernel:0")
    with pytest.raises(ConversionError, match="neither a non-local block"):
        convert(arrays)


@pytest.mark.parametrize(
    "layout", ["model_weights/{0}/{0}/{1}:0", "{0}/{0}/{1}:0", "layers/{0}/vars/{2}"]
)
def test_hdf5(layout, tmp_path):
    h5py = pytest.importorskip("h5py")
    arrays = kernels(2)
    with h5py.File(tmp_path / "model.h5", "w") as file:
        for name, array in arrays.items():
            layer, weight = name[:-2].split("/")
            file[layout.format(layer, weight, "0" if weight == "kernel" else "1")] = array
    read = {
        name.partition(":")[0]: array
        for name, array in load_checkpoint(tmp_path / "model.h5").items()
    }
    assert read.keys() == {name[:-2] for name in arrays}
    said = {"pairwise": "dot_product", "subsample": "none"}
    converted = convert(load_checkpoint(tmp_path / "model.h5"), **said).state_dict
    torch.testing.assert_close(converted, convert(arrays, **said).state_dict)
    (tmp_path / "model.h5").write_bytes(b"no HDF5")
    with pytest.raises(CheckpointError, match="it is damaged, or of another format"):
        load_checkpoint(tmp_path / "model.h5")


def test_hdf5_needs_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "model.h5").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"takes h5py \(pip install h5py\)"):
        load_checkpoint(tmp_path / "model.h5")
