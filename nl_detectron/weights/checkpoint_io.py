"""
Reading and writing checkpoint files. A checkpoint is data: a file that asks for anything but
tensors, arrays and plain containers is refused, and nothing in it is ever run.
"""

from __future__ import annotations

import importlib
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from nl_detectron.files import whole_file
from nl_detectron.validation import check_choice

STATE_DICT_KEYS = ("blobs", "model_state", "state_dict", "model")
"""Where training programs keep the state dict: Caffe2, SlowFast, mmcv and Lightning, Detectron2."""

_NUMERIC_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16|[?bBhHiIlLqQefdFD])")


class CheckpointError(ValueError):
    """A file is no checkpoint, or none for this model; the message names it and says why."""


class _Refusal(pickle.UnpicklingError):
    """What a file holds is well-formed, but not allowed."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """
    Read a checkpoint of any kind without running anything that is in it.

    Args:
        path: a local file. ``.pkl`` is a pickle of arrays, as in the model zoos of Detectron and
            Detectron2, possibly written by Python 2; ``.safetensors`` is a file of that format;
            ``.h5`` is a file of Keras's weights, in HDF5, which takes h5py; every other file is
            read as one that ``torch.save`` wrote.

    Returns:
        What the file holds, unchanged: a state dict, or a dict that has one under one of
        :data:`STATE_DICT_KEYS`. Tensors are on the CPU; the arrays of a ``.pkl`` or ``.h5`` are
        NumPy arrays. The names of those of a ``.h5`` have the layer and the weight, such as
        ``conv2d_1/kernel:0``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is corrupt, truncated, not a checkpoint, or holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint {path} does not exist")
    read = _READERS.get(path.suffix.lower(), _read_torch)
    try:
        content = read(path)
    # The readers know only sound files: on others they fail with any error at all.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(
            f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict of names"
        )
    return content


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """
    Write a state dict so that Detectron2 loads it. The file appears complete or not at all.

    Args:
        checkpoint: a state dict, names to tensors or NumPy arrays; or what :func:`load_checkpoint`
            returns, with a state dict under one of :data:`STATE_DICT_KEYS`. Only the state dict's
            tensors and arrays are written, not an optimizer's state, for instance.
        path: ``.pth`` for Detectron2's own form, ``{"model": state_dict}``, whose names have to be
            the model's; ``.pkl`` for the form of its model zoo, whose names may lack a prefix such
            as ``backbone.bottom_up``; ``.safetensors`` for the state dict alone.

    Raises:
        ValueError: ``path`` has another suffix, or there are no tensors to write.
    """
    path = Path(path)
    check_choice(f"the suffix of {path}", path.suffix, tuple(_WRITERS))
    tensors = {
        name: torch.as_tensor(value).detach().cpu()
        for name, value in unwrap_state_dict(checkpoint).items()
        if isinstance(value, (Tensor, np.ndarray))
    }
    if not tensors:
        raise ValueError(f"{path} is not written: there are no tensors in {list(checkpoint)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        _WRITERS[path.suffix](tensors, draft)


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Find the state dict in a checkpoint.

    Args:
        checkpoint: what :func:`load_checkpoint` returns.

    Returns:
        The dict under one of :data:`STATE_DICT_KEYS`, or ``checkpoint`` itself if there is none.
    """
    for key in STATE_DICT_KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    return checkpoint


def _read_torch(path: Path) -> Any:
    # Up to torch 2.5 the reader of this old format runs code even with weights_only.
    if tarfile.is_tarfile(path):
        raise _Refusal("it is a tar archive, the format of PyTorch before 0.1.10")
    if zipfile.is_zipfile(path):  # what torch.save writes, with checksums that torch never reads
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():
                raise _Refusal(f"it is damaged: {part} in it does not match its checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


def _write_torch(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": tensors}, path)


def _write_pickle(tensors: dict[str, Tensor], path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    content = {"model": arrays, "__author__": "nl_detectron", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=4))


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    # Copies, because the format has no tensors that share memory.
    copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    safetensors.torch.save_file(copies, path)


def _read_keras(path: Path) -> Any:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise _Refusal("reading HDF5 takes h5py (pip install h5py)") from None
    arrays: dict[str, np.ndarray] = {}

    def add(name: str, item: Any) -> None:
        # "model_weights/conv2d/conv2d/kernel:0"; Keras 3 has "layers/conv2d/vars/0".
        parts = ["kernel" if p == "0" else "bias" for p in name.split("/")[-1:] if p in "01"]
        parts = [name.split("/")[-3], *parts] if "/vars/" in name else name.split("/")[-2:]
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "biuf":
            arrays["/".join(parts)] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(add)
    return arrays


_READERS: dict[str, Callable[[Path], Any]] = {
    ".h5": _read_keras,
    ".pkl": _read_pickle,
    ".safetensors": safetensors.torch.load_file,
}
_WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    ".pth": _write_torch,
    ".pkl": _write_pickle,
    ".safetensors": _write_safetensors,
}


def _reason(error: Exception) -> str:
    """What an error says in one line, without PyTorch's advice to load the file unsafely."""
    if isinstance(error, _Refusal):
        return str(error)
    refused = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
    if refused:
        return _not_data(refused[1])
    lines = [line for line in str(error).splitlines() if line and "weights_only" not in line]
    detail = ": ".join([type(error).__name__, *lines[:1]])
    return f"it is damaged, or of another format ({detail})"


def _not_data(name: str) -> str:
    return (
        f"it asks for {name}, which is neither a tensor, an array nor a plain container, and could "
        "run code. If you trust the file, save its state dict alone with the program that made it"
    )


class _DType:
    """Replaces NumPy's ``dtype``, whose own state can be set to what crashes NumPy."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self._set(code.decode("ascii") if isinstance(code, bytes) else code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        byte_order = state[1]
        self._set(byte_order.replace("|", "") + self.code.lstrip("<>=|"))

    def _set(self, code: str) -> None:
        if not _NUMERIC_DTYPE.fullmatch(code):
            raise _Refusal(f"it has an array of {code!r}, which are no numbers")
        self.code = code


class _Array(np.ndarray):
    """An array whose state is checked before NumPy sees it; pickled again it is a plain one."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        order: Any = "F" if is_fortran else "C"
        values = _from_buffer(data, dtype, shape, order)
        state = (1, values.shape, values.dtype, bool(is_fortran), values.tobytes(order))
        super().__setstate__(state)


def _from_buffer(data: Any, dtype: _DType, shape: tuple[int, ...], order: Any) -> np.ndarray:
    """An array in the byte order of this machine, the only one that PyTorch takes."""
    if isinstance(data, str):  # as Python 2 wrote it
        data = data.encode("latin1")
    values = np.frombuffer(bytearray(memoryview(data)), np.dtype(dtype.code))
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return native.reshape(tuple(int(size) for size in shape), order=order)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise _Refusal(f"it has bytes in {encoding!r}, not in 'latin1'")
    return text.encode("latin1")


class _ArrayUnpickler(pickle._Unpickler):
    """
    Reads pickles of arrays and plain containers. Its base is the unpickler written in Python: the
    one written in C allocates as much memory as a corrupt file tells it to.
    """

    # NumPy 1 and 2 have the same functions under two names; these are called in their place.
    NUMPY: ClassVar[dict[str, Any]] = {
        "multiarray._reconstruct": lambda *_: _Array(0, np.uint8),  # its state is set later
        "multiarray.scalar": lambda dtype, data: _from_buffer(data, dtype, (), "C")[()],
        "numeric._frombuffer": _from_buffer,
    }
    ALLOWED: ClassVar[dict[str, Any]] = {
        **{f"numpy.core.{name}": function for name, function in NUMPY.items()},
        **{f"numpy._core.{name}": function for name, function in NUMPY.items()},
        "numpy.ndarray": None,  # only ever an argument of _reconstruct
        "numpy.dtype": _DType,
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": _encode,
        "__builtin__.bytes": lambda: b"",  # how Python 3 writes b"" for Python 2
        "builtins.set": set,
        "__builtin__.set": set,
    }

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self.ALLOWED:
            raise _Refusal(_not_data(full_name))
        return self.ALLOWED[full_name]

    def load_build(self) -> None:
        """Set an object's state, which matters for arrays and their types alone."""
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, (_Array, _DType)):
            instance.__setstate__(state)
        elif type(instance) is not OrderedDict:  # a state dict's, with versions of modules
            raise _Refusal(f"it sets the state of a {type(instance).__name__}")

    dispatch: ClassVar[Any] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
