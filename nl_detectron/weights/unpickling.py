"""Pickles, and the files that ``torch.save`` writes, read as data: nothing in them is run."""

from __future__ import annotations

import io
import math
import pickle
import re
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
import torch

from nl_detectron.weights.placeholder import NotDataError, Placeholder, placeholders_in

# What torch.save wrote before it wrote zip archives begins with these two numbers.
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
# An expanded view takes no room in a file; more than this is taken for an attack.
_MOST_EXPANDED_BYTES = 2**28
_NUMERIC_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16|[?bBhHiIlLqQefdFD])")
_STORAGE_DTYPES = {
    f"{name}Storage": getattr(torch, dtype)
    for name, dtype in {
        **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
        **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
        **{"Bool": "bool", "ComplexDouble": "complex128", "ComplexFloat": "complex64"},
        **{"QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "Untyped": "uint8"},
    }.items()
}
_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values (of the device meta)",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
}


def read_pickled(path: Path) -> Any:
    """What a pickle, or a file that ``torch.save`` wrote in any of its formats, holds as data."""
    if tarfile.is_tarfile(path):
        raise NotDataError("it is a tar archive, the format of PyTorch before 0.1.10")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == b"PK\3\4":
            return _read_archive(file, size)
        file.seek(0)
        content = _Unpickler(file).load()
        is_legacy = type(content) is int and content == _LEGACY_MAGIC
        return _read_legacy(file, size) if is_legacy else content


def _read_archive(file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {name.partition("/")[2]: name for name in archive.namelist()}
        if sum(record.file_size for record in archive.infolist()) > size:
            raise NotDataError("it is a compressed archive, which torch.save does not write")

        def read(name: str) -> bytearray:
            return bytearray(archive.read(records[name]))

        if "byteorder" in records and read("byteorder") != b"little":
            raise NotDataError("it was written by a machine of another byte order")
        pickled = io.BytesIO(read("data.pkl"))
        return _Unpickler(pickled, lambda key, _: read(f"data/{key}")).load()


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """Pickles, the last of which names the storages that come after them, in their order."""
    if _Unpickler(file).load() != _LEGACY_VERSION or not _Unpickler(file).load()["little_endian"]:
        raise NotDataError("it is of another version of PyTorch's format, or another byte order")
    buffers: dict[str, bytearray] = {}

    def make(key: str, num_bytes: int) -> bytearray:
        if num_bytes > size:
            raise EOFError(f"it has no tensor of {num_bytes} bytes")
        buffers[key] = bytearray(num_bytes)
        return buffers[key]

    content = _Unpickler(file, make).load()
    for key in _Unpickler(file).load():
        file.read(8)  # how many elements, as the pickle said
        if file.readinto(buffers[key]) != len(buffers[key]):  # type: ignore[attr-defined]
            raise EOFError("it ends within a tensor")
    return content


class _Storage(NamedTuple):
    values: torch.UntypedStorage
    dtype: torch.dtype


class _DType(Placeholder):
    """Replaces NumPy's ``dtype``, whose own state can be set to what crashes NumPy."""

    def __init__(self, code: Any, *_: Any) -> None:
        if isinstance(code, bytes):
            code = code.decode("ascii")
        super().__init__(f"numpy.dtype of {code.name if isinstance(code, Placeholder) else code!r}")
        self.code = code

    def set_state(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise NotDataError(f"it has an array of the byte order {state[1]!r}")
        if isinstance(self.code, str):
            self.code = state[1].replace("|", "") + self.code.lstrip("<>=|")

    @property
    def of_numbers(self) -> np.dtype | None:
        """NumPy's own; None if it is of anything but numbers that PyTorch has."""
        is_numeric = isinstance(self.code, str) and _NUMERIC_DTYPE.fullmatch(self.code)
        return np.dtype(self.code) if is_numeric else None


class _UnsetArray:
    """An array before its state is set."""


def _array(data: Any, dtype: _DType, shape: Iterable[int], order: Any) -> Any:
    """An array in the byte order of this machine, the only one that PyTorch takes."""
    numbers = dtype.of_numbers
    if numbers is None:
        return Placeholder(f"an array of {dtype.name.removeprefix('numpy.dtype of ')}")
    if isinstance(data, str):  # as Python 2 wrote it
        data = data.encode("latin1")
    values = np.frombuffer(bytearray(memoryview(data)), numbers)
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return native.reshape(tuple(int(size) for size in shape), order=order)


def _scalar(dtype: _DType, data: Any) -> Any:
    value = _array(data, dtype, (), "C")
    return value if isinstance(value, Placeholder) else value[()]


class _Unpickler(pickle._Unpickler):
    """
    Makes plain containers, arrays and tensors, and placeholders for all else that a pickle asks
    for. Its base is the unpickler written in Python: the one written in C allocates as much memory
    as a corrupt file tells it to.
    """

    # NumPy 1 and 2 have the same functions under two names; these are called in their place.
    NUMPY: ClassVar[dict[str, Any]] = {
        "multiarray._reconstruct": lambda *_: _UnsetArray(),
        "multiarray.scalar": _scalar,
        "numeric._frombuffer": _array,
    }
    MADE: ClassVar[dict[str, Any]] = {
        **{f"numpy.core.{name}": function for name, function in NUMPY.items()},
        **{f"numpy._core.{name}": function for name, function in NUMPY.items()},
        "numpy.dtype": _DType,
        "collections.OrderedDict": OrderedDict,
        "collections.Counter": Counter,
        "collections.defaultdict": lambda *_: {},
        "collections.deque": lambda items=(), *_: list(items),
        "torch.Size": torch.Size,
        "_codecs.encode": lambda text, _: text.encode("latin1"),  # how Python 3 writes bytes
        "__builtin__.bytes": lambda: b"",  # and b"", for Python 2
        **{
            f"{module}.{kind.__name__}": kind
            for module in ("builtins", "__builtin__")
            for kind in (set, frozenset, complex)
        },
        # Only ever arguments of functions that make arrays and tensors.
        **dict.fromkeys(("numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter")),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch._tensor._rebuild_from_type_v2": lambda make, kind, args, state: make(*args),
    }

    memo: dict[int, Any]
    stack: list[Any]

    def __init__(
        self, file: Any, read_storage: Callable[[str, int], bytearray] | None = None
    ) -> None:
        super().__init__(file, encoding="latin1")
        self._read_storage = read_storage
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._expanded_bytes = 0
        versions = ("", "_v2", "_v3")
        tensors = {f"torch._utils._rebuild_tensor{version}": self._tensor for version in versions}
        self._made = {**self.MADE, **tensors}

    def find_class(self, module: str, name: str) -> Any:
        """What makes it here; nothing is imported."""
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if module == "torch._utils" and name in _OTHER_TENSORS:
            return Placeholder(_OTHER_TENSORS[name])
        full_name = " ".join(f"{module}.{name}".split())[:100]  # for messages of one line
        return self._made[full_name] if full_name in self._made else Placeholder(full_name)

    def persistent_load(self, pid: Any) -> Any:
        """The storage of a tensor; of a module, in old files, its class."""
        kind, what, *rest = pid
        if kind == "module":
            return what
        if kind != "storage" or self._read_storage is None:
            raise NotDataError(f"it refers to {kind!r}")
        key, _, numel, *view = rest
        if view not in ([], [None]):
            raise NotDataError("it has views of storages, as before PyTorch 0.4")
        if not isinstance(what, torch.dtype):
            return what
        if key not in self._storages:
            data = self._read_storage(key, numel * what.itemsize)
            if data:
                values = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
            self._storages[key] = values if data else torch.UntypedStorage(0)
        return _Storage(self._storages[key], what)

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
        """
        The rest: requires_grad and hooks; in the third version the dtype, of which there are no
        storages; and in a dict whether it is yet to be conjugated or negated.
        """
        if not isinstance(storage, _Storage):
            return storage
        if any(type(x) is dict and x for x in rest):
            return Placeholder("a tensor that is yet to be conjugated or negated")
        values, dtype = storage
        dtype = next((x for x in rest if isinstance(x, torch.dtype)), dtype)
        num_bytes = math.prod([dtype.itemsize, *shape])
        if num_bytes > values.nbytes():
            self._expanded_bytes += num_bytes
            if self._expanded_bytes > _MOST_EXPANDED_BYTES:
                return Placeholder(f"a view of shape {tuple(shape)} of {values.nbytes()} bytes")
        return torch.empty(0, dtype=dtype).set_(values, offset, tuple(shape), tuple(stride))

    def load_build(self) -> None:
        """Set an object's state, which matters for arrays, their types and state dicts alone."""
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, _DType):
            instance.set_state(state)
        elif isinstance(instance, _UnsetArray):
            _, shape, dtype, is_fortran, data = state
            self._replace(instance, _array(data, dtype, shape, "F" if is_fortran else "C"))
        elif type(instance) is OrderedDict:  # a state dict's, with versions of modules
            if found := placeholders_in(state):
                self._replace(instance, found[0])
            elif "_metadata" in state:
                instance._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif not isinstance(instance, Placeholder):
            raise NotDataError(f"it sets the state of a {type(instance).__name__}")

    def _replace(self, old: Any, new: Any) -> None:
        """Put an object in the place of the last one and of what refers to that."""
        self.stack[-1] = new
        for key in reversed(self.memo):
            if self.memo[key] is old:
                self.memo[key] = new
                break

    def load_newobj_ex(self) -> None:
        """As a call without keywords: only placeholders are made so."""
        self.stack.pop()
        pickle._Unpickler.load_reduce(self)  # type: ignore[attr-defined]

    dispatch: ClassVar[Any] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce,  # type: ignore[attr-defined]
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
    }
