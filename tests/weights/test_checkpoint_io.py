"""Checkpoint files: what is written is read, and what is not data is refused."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import re
import subprocess
import tarfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nl_detectron.weights.checkpoint_io import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    with_plain_names,
)
from tests.corruption import nothing_is_run, read_corrupted

SUFFIXES = [".pth", ".pkl", ".safetensors"]


def state_dict():
    weight = torch.randn(4, 6)
    return {
        "conv.weight": weight.T,  # not contiguous
        "shared": weight,
        "half": torch.ones(3, dtype=torch.float16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "array": np.arange(6.0).reshape(2, 3),
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(suffix, tmp_path):
    path = tmp_path / "new folder" / f"model{suffix}"
    expected = state_dict()
    save_checkpoint(expected, path)
    content = load_checkpoint(path)
    weights = content if suffix == ".safetensors" else content["model"]
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        value = torch.as_tensor(value)
        loaded = torch.as_tensor(weights[name])
        assert loaded.dtype == value.dtype
        assert torch.equal(loaded, value)
    assert ("matching_heuristics" in content) == (suffix == ".pkl")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "others",
    [
        {"model": {"optimizer": {"lr": 0.1}, "iteration": 7}},
        {"state_dict": {"epoch": 3}},
        {"blobs": {}},
        {"model_state": {"cfg": "MODEL: x"}},
        {},
    ],
    ids=list,
)
def test_what_is_loaded_can_be_saved(others, suffix, tmp_path):
    expected = {name: torch.as_tensor(value) for name, value in state_dict().items()}
    content = expected
    for key, rest in others.items():
        content = {key: expected, **rest}
    torch.save(content, tmp_path / "theirs.pth")
    save_checkpoint(load_checkpoint(tmp_path / "theirs.pth"), tmp_path / f"ours{suffix}")
    save_checkpoint(load_checkpoint(tmp_path / f"ours{suffix}"), tmp_path / "again.pth")
    weights = load_checkpoint(tmp_path / "again.pth")["model"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_checkpoint_without_tensors_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"model\.pth is not written: .* \['model', 'epoch'\]"):
        save_checkpoint({"model": {}, "epoch": 3}, tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_interrupted_write_leaves_the_old_file(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(state_dict(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_suffixes_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"'\.onnx', but must be one of '\.pth', '\.pkl', '\.safe"):
        save_checkpoint(state_dict(), tmp_path / "model.onnx")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        np.arange(4, dtype=">i8"),
        np.array([True, False]),
        np.zeros((0, 3), np.uint8),
        np.array(1.5, np.float32),
        np.float32(2.5),
        np.int64(3),
    ],
    ids=lambda value: f"{value.dtype.str}{list(value.shape)}",
)
def test_pickles_of_every_protocol(value, protocol, tmp_path):
    path = tmp_path / "model.pkl"
    others = (1, 2.5, "ü", b"\xff", b"", None, True, {1, 2}, 2**70)
    content = collections.OrderedDict(value=value, others=others, nested={"a": [1, (2,)]})
    content._metadata = {"version": 1}  # a state dict's
    path.write_bytes(pickle.dumps(content, protocol))
    loaded = load_checkpoint(path)
    actual = loaded["value"]
    assert isinstance(actual, type(value))
    assert actual.dtype == value.dtype.newbyteorder("=")
    assert np.array_equal(actual, value)
    assert (loaded["others"], loaded["nested"]) == (others, {"a": [1, (2,)]})
    if isinstance(actual, np.ndarray):
        torch.from_numpy(actual)
        assert type(pickle.loads(pickle.dumps(actual, protocol))) is np.ndarray


# In the form in which Python 2 and NumPy 1 write, by protocol,
# {"blobs": {"conv1_w": numpy.array([[1, 2]], "float32"), u"x": numpy.float64(0.5)}}.
PYTHON_2 = {
    0: (
        b"(dp0\nS'blobs'\np1\n(dp2\nS'conv1_w'\np3\ncnumpy.core.multiarray\n_reconstruct\np4\n"
        b"(cnumpy\nndarray\np5\n(I0\ntp6\nS'b'\np7\ntp8\nRp9\n(I1\n(I1\nI2\ntp10\ncnumpy\ndtype\n"
        b"p11\n(S'f4'\np12\nI0\nI1\ntp13\nRp14\n(I3\nS'<'\np15\nNNNI-1\nI-1\nI0\ntp16\nbI00\n"
        b"S'\\x00\\x00\\x80?\\x00\\x00\\x00@'\np17\ntp18\nbsVx\np19\ncnumpy.core.multiarray\n"
        b"scalar\np20\n(g11\n(S'f8'\np21\nI0\nI1\ntp22\nRp23\n(I3\nS'<'\np24\nNNNI-1\nI-1\nI0\n"
        b"tp25\nbS'\\x00\\x00\\x00\\x00\\x00\\x00\\xe0?'\np26\ntp27\nRp28\nss."
    ),
    2: (
        b"\x80\x02}q\x00U\x05blobsq\x01}q\x02(U\x07conv1_wq\x03cnumpy.core.multiarray\n"
        b"_reconstruct\nq\x04cnumpy\nndarray\nq\x05K\x00\x85q\x06U\x01bq\x07\x87q\x08Rq\t("
        b"K\x01K\x01K\x02\x86q\ncnumpy\ndtype\nq\x0bU\x02f4q\x0cK\x00K\x01\x87q\rRq\x0e("
        b"K\x03U\x01<q\x0fNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x10b\x89U\x08"
        b"\x00\x00\x80?\x00\x00\x00@q\x11tq\x12bX\x01\x00\x00\x00xq\x13cnumpy.core.multiarray\n"
        b"scalar\nq\x14h\x0bU\x02f8q\x15K\x00K\x01\x87q\x16Rq\x17(K\x03U\x01<q\x18NNNJ"
        b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x19bU\x08\x00\x00\x00\x00\x00\x00\xe0?q\x1a"
        b"\x86q\x1bRq\x1cus."
    ),
}


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_pickles_of_python_2(protocol, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(PYTHON_2[protocol])
    blobs = load_checkpoint(path)["blobs"]
    assert blobs["conv1_w"].dtype == np.float32
    assert blobs["conv1_w"].tolist() == [[1, 2]]
    assert blobs["x"] == 0.5


class Calls:
    """Pickled, it asks to be unpickled by a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


class Builds(Calls):
    """And then to have its state set by another one."""

    def __reduce__(self):
        return collections.OrderedDict, (), {"a": Calls(*self.reduced)}


def numpy_array_of(value):
    """An array of objects, whose elements are pickled within it."""
    array = np.empty(1, object)
    array[0] = value
    return array


def exploits(evidence):
    command = f"touch {evidence}"
    script = f"open({str(evidence)!r}, 'w')"
    system = Calls(os.system, command)
    return {
        "os.system": system,
        "subprocess": Calls(subprocess.call, ["touch", str(evidence)]),
        "eval": Calls(eval, script),
        "exec": Calls(exec, script),
        "open": Calls(open, str(evidence), "w"),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "nested": Calls(collections.OrderedDict, [("a", Calls(list, (system,)))]),
        "in a tensor's place": {"weight": torch.zeros(2), "bias": [system]},
        "in an array": numpy_array_of(system),
        "as an array's state": Builds(os.system, command),
        "rebuild_tensor": Calls(torch._utils._rebuild_tensor_v2, system, 0, (1,), (1,), False, {}),
        "rebuild_from_type": Calls(torch._tensor._rebuild_from_type_v2, eval, str, (script,), {}),
        "numpy's loader": Calls(np.load, str(evidence)),
        "pickle in pickle": Calls(pickle.loads, pickle.dumps(system)),
        "partial": Calls(__import__("functools").partial(os.system, command)),
    }


EXPLOITS = list(exploits(""))


@pytest.mark.parametrize("kind", EXPLOITS)
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".legacy.pth"])
def test_exploits_are_refused(kind, suffix, tmp_path):
    evidence = tmp_path / "evidence"
    path = write({"model": {"weight": exploits(evidence)[kind]}}, tmp_path / f"model{suffix}")
    with pytest.raises(CheckpointError) as error, nothing_is_run():
        load_checkpoint(path)
    assert not evidence.exists()
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)  # PyTorch's advice how to run it after all


@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "system"), (eval, "eval"), (subprocess.Popen, "Popen")]
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_what_was_refused_is_named(function, name, suffix, tmp_path):
    path = write({"model": {"a": Calls(function, "x")}}, tmp_path / f"model{suffix}")
    with pytest.raises(CheckpointError, match=rf"it asks for (\w+\.)?{name}, which is neither a"):
        load_checkpoint(path)


def write(content, path):
    """By what the suffix says: a pickle, or a file of torch.save in its new or old format."""
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        is_zip = not path.name.endswith(".legacy.pth")
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


@pytest.mark.parametrize("kind", EXPLOITS)
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".legacy.pth"])
def test_code_beside_sound_weights_is_left_out(kind, suffix, tmp_path, caplog):
    evidence, weights = tmp_path / "evidence", {"a.weight": np.ones(2)}
    content = {"model": weights, "epoch": 3, "optimizer": [exploits(evidence)[kind]]}
    path = write(content, tmp_path / f"model{suffix}")
    with caplog.at_level("INFO", "nl_detectron"), nothing_is_run():
        loaded = load_checkpoint(path)
    assert not evidence.exists()
    assert np.array_equal(loaded["model"]["a.weight"], weights["a.weight"])
    assert loaded["epoch"] == 3
    assert f"Not data, and left out of {path}: " in caplog.text
    save_checkpoint(loaded, tmp_path / "again.pth")


def mmengine_checkpoint():
    logging = pytest.importorskip("mmengine.logging")
    config = pytest.importorskip("mmengine").ConfigDict(type="SGD", lr=0.1)
    scalars = {"train/loss": logging.HistoryBuffer([1.0, 2.0], [1, 1])}
    return {"meta": {"cfg": config, "epoch": 1}, "message_hub": {"log_scalars": scalars}}


class Attributes(dict):
    """As Lightning's hyperparameters are."""

    __getattr__ = dict.__getitem__


def trainer_states():
    """What programs save beside weights, and the names that are left out."""
    generator = np.random.default_rng(0)
    return {
        "lightning": (
            {"hyper_parameters": Attributes(lr=0.1), "callbacks": {"a": {"path": Path("x")}}},
            "Attributes",
        ),
        "accelerate": (
            {"numpy_random_seed": np.random.get_state(), "generator": generator},
            "numpy.random._pickle.__generator_ctor",
        ),
        "namespace": ({"args": argparse.Namespace(lr=0.1), "when": datetime.now()}, "datetime"),
        "optimizer": ({"optimizer": torch.optim.Adam(nn.Linear(2, 2).parameters())}, "Adam"),
        "module": ({"ema": nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
        "containers": (
            {
                "a": collections.defaultdict(list, {1: [2]}),
                "b": collections.deque([1]),
                "c": collections.Counter("a"),
                "d": (frozenset({1}), 1j, torch.Size([2]), torch.float16, range(3)),
            },
            "range",
        ),
    }


@pytest.mark.parametrize("kind", ["mmengine", *trainer_states()])
@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth"])
def test_states_of_trainers_do_not_keep_the_weights(kind, suffix, tmp_path, caplog):
    if kind == "mmengine":
        others, name = mmengine_checkpoint(), "mmengine.logging.history_buffer.HistoryBuffer"
    else:
        others, name = trainer_states()[kind]
    weights = {"a.weight": torch.ones(2)}
    for content in ({"state_dict": weights, **others}, {**weights, **others}):
        path = write(content, tmp_path / f"model{suffix}")
        with caplog.at_level("INFO", "nl_detectron"):
            loaded = load_checkpoint(path)
        found = loaded.get("state_dict", loaded)["a.weight"]
        assert torch.equal(found, torch.ones(2))
        assert name in caplog.text
        caplog.clear()


DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint64"),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth"])
def test_tensors_of_every_type(dtype, suffix, tmp_path):
    if not hasattr(torch, dtype):
        pytest.skip("this PyTorch has no such type")
    values = torch.tensor([[0, 1, 2], [3, 4, 6]]).to(getattr(torch, dtype))
    weights = {"a.weight": values.T, "row": values[1], "first": values[:, 0], "p": values.clone()}
    weights["e"] = values[:1, :1].expand(4, 5)
    if values.is_floating_point() and values.dtype.itemsize > 1:
        weights["p"] = nn.Parameter(weights["p"])
    loaded = load_checkpoint(write({"model": weights}, tmp_path / f"model{suffix}"))["model"]
    assert all(torch.equal(loaded[n].view(t.dtype), t) for n, t in weights.items())
    assert loaded["row"].data_ptr() > loaded["a.weight"].data_ptr()  # the memory is shared
    save_checkpoint(loaded, tmp_path / "again.pkl")
    arrays = load_checkpoint(tmp_path / "again.pkl")["model"]
    for name, tensor in weights.items():
        exact = torch.complex128 if tensor.is_complex() else torch.float64
        assert torch.equal(torch.as_tensor(arrays[name]).to(exact), tensor.detach().to(exact))


def tensors_that_are_no_weights():
    return {
        "sparse": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "meta": torch.empty(2, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "view": torch.ones(1).expand(2**20, 2**20),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "uint8": torch.ones(2, dtype=torch.uint8),
    }


@pytest.mark.parametrize("kind", tensors_that_are_no_weights())
@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth"])
def test_tensors_that_are_no_weights(kind, suffix, tmp_path):
    tensor, sound = tensors_that_are_no_weights()[kind], {"b": torch.ones(2)}
    try:
        path = write({"model": sound, "other": tensor}, tmp_path / f"model{suffix}")
    except Exception:
        pytest.skip("this PyTorch does not write it")
    assert torch.equal(load_checkpoint(path)["model"]["b"], torch.ones(2))
    weights = {"a.weight": tensor, **sound}
    for content in (weights, {"model": weights}):
        path = write(content, path)
        if kind == "uint8":
            loaded = load_checkpoint(path)
            assert loaded.get("model", loaded)["a.weight"].tolist() == [1, 1]
            continue
        with pytest.raises(CheckpointError, match=r"model.*: a\.weight in it is a \w+") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["sparse", "meta", "nested", "quantised"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_cannot_be_written_is_named(kind, suffix, tmp_path):
    tensor = tensors_that_are_no_weights()[kind]
    with pytest.raises(ValueError, match=r"model\.\w+ is not written: w is an? .* tensor, not"):
        save_checkpoint({"w": tensor}, tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_versions_of_modules_are_kept(tmp_path):
    weights = nn.BatchNorm2d(3).state_dict()
    loaded = load_checkpoint(write({"model": weights}, tmp_path / "model.pth"))["model"]
    assert loaded._metadata == weights._metadata
    assert loaded._metadata[""]["version"] == 2


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_names_without_wrappers(prefix, wrapper):
    wrapped = {f"{prefix}res4.nonlocal0.{wrapper}.g.weight": 1, f"{prefix}res4.0.{wrapper}.b": 2}
    plain = {"res4.nonlocal0.g.weight": 1, "res4.0.b": 2}
    assert with_plain_names(wrapped) == plain
    assert with_plain_names({"n_averaged": 3, **wrapped}) == {"n_averaged": 3, **plain}
    assert with_plain_names(plain) is plain
    with pytest.raises(CheckpointError, match="the same name"):
        with_plain_names({**plain, "res4.0._orig_mod.b": 2})


def test_opcodes_that_need_no_call(tmp_path):
    path = tmp_path / "model.pkl"
    for content in (
        b"(S'touch x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch x'\no.",  # OBJ
        b"cos\nsystem\n(S'touch x'\nt\x81.",  # NEWOBJ
        b"Ppersistent\n.",  # PERSID
        b"\x80\x02\x82\x01.",  # EXT1
        b"cnumpy\nndarray\n(I4\nS'O'\nt\x81.",  # a class that is only ever an argument
        b"cnumpy.core.multiarray\n_reconstruct\n}S'__code__'\nI1\nsb.",  # a function's state
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"}S'a'\ncnumpy\ndtype\n(S'f4'\ntR(I3\nS'O,'\ntbs.",  # a byte order that is none
        b"}I1\nI2\ns.",  # names that are none
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.pkl"), nothing_is_run():
            load_checkpoint(path)


@pytest.mark.parametrize(
    "array",
    [
        np.array([object()]),
        np.array(["text"]),
        np.zeros(2, [("a", "f4"), ("b", "O")]),
        np.zeros(1, "datetime64[s]"),
        np.zeros(1, "V8"),
        np.zeros(1, np.longdouble),
    ],
    ids=lambda array: array.dtype.str,
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".legacy.pth"])
def test_arrays_of_anything_but_numbers_are_refused(array, suffix, tmp_path):
    array = array if array.dtype != object else numpy_array_of(1)
    path = write({"model": {"a": array}}, tmp_path / f"model{suffix}")
    with pytest.raises(CheckpointError, match=r"model\..*a in it is an array of '[|<]?\w+.*num"):
        load_checkpoint(path)


def tar_archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return file.getvalue()


def zipped(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


DAMAGED = r" cannot be read as a checkpoint: \w"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (f"model{suffix}", content, DAMAGED)
        for suffix in SUFFIXES
        for content in (b"", b"{}", b"<html>404</html>", b"\0" * 100)
    ]
    + [
        # An array that is larger than its data.
        ("model.pkl", PYTHON_2[2].replace(b"K\x01K\x01K\x02\x86", b"K\x01K\x01K\xff\x86"), ""),
        ("model.pth", tar_archive(), ".*tar archive"),
        ("model.pth", zipped([torch.zeros(1)]), " is not a checkpoint: it holds a list"),
    ],
)
def test_other_files_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(name) + message):
        load_checkpoint(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pth does not exist"):
        load_checkpoint(tmp_path / "no.pth")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".legacy.pth", ".protocol2.pkl"])
def test_corrupt_files(suffix, tmp_path):
    folder = tmp_path / "corrupt"
    folder.mkdir()
    sound, path = (parent / f"model{suffix}" for parent in (tmp_path, folder))
    if suffix == ".legacy.pth":
        content = {"model": {"a": torch.randn(3, 4)}, "optimizer": {"state": {0: [1.5, None]}}}
        torch.save(content, sound, _use_new_zipfile_serialization=False)
    elif suffix == ".protocol2.pkl":
        sound.write_bytes(pickle.dumps({"blobs": {"conv1_w": np.ones((4, 3, 1, 1))}}, 2))
    else:
        save_checkpoint(state_dict(), sound)
    num_refused = read_corrupted(sound.read_bytes(), path, load_checkpoint, CheckpointError)
    assert num_refused > 20
