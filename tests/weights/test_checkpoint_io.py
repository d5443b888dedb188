"""Checkpoint files: what is written is read, and what is not data is refused."""

from __future__ import annotations

import collections
import io
import os
import pickle
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from nl_detectron.weights.checkpoint_io import CheckpointError, load_checkpoint, save_checkpoint
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
    path = tmp_path / f"model{suffix}"
    content = {"model": {"weight": exploits(evidence)[kind]}}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        is_zip = suffix == ".pth"
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
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
    path = tmp_path / f"model{suffix}"
    content = {"a": Calls(function, "x")}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"it asks for (\w+\.)?{name}, which is neither a"):
        load_checkpoint(path)


def test_a_hostile_pickle_in_a_sound_archive(tmp_path):
    evidence, sound, path = (tmp_path / name for name in ("evidence", "sound.pth", "model.pth"))
    save_checkpoint(state_dict(), sound)
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            is_pickle = name.endswith("data.pkl")
            content = (
                pickle.dumps(Calls(os.mkdir, str(evidence)), 2) if is_pickle else old.read(name)
            )
            new.writestr(name, content)
    with pytest.raises(CheckpointError, match="mkdir"):
        load_checkpoint(path)
    assert not evidence.exists()


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
    ],
    ids=lambda array: array.dtype.str,
)
def test_arrays_of_anything_but_numbers_are_refused(array, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"a": array if array.dtype != object else numpy_array_of(1)}))
    with pytest.raises(CheckpointError, match=r"model\.pkl.*(which are no numbers|it asks for)"):
        load_checkpoint(path)


def test_arrays_larger_than_their_data_are_refused(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(PYTHON_2[2].replace(b"K\x01K\x01K\x02\x86", b"K\x01K\x01K\xff\x86"))
    with pytest.raises(CheckpointError, match=r"model\.pkl"):
        load_checkpoint(path)


def test_tar_archives_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(CheckpointError, match=r"model\.pth.*tar archive"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"{}", b"<html>404</html>", b"\0" * 100])
def test_other_files_are_refused(suffix, content, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"model\{suffix} cannot be read as a checkpoint: \w"
    ):
        load_checkpoint(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pth does not exist"):
        load_checkpoint(tmp_path / "no.pth")


def test_what_is_no_dict_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match=r"model\.pth is not a checkpoint: it holds a list"):
        load_checkpoint(path)


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
