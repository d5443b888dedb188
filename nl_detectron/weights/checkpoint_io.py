"""
Reading and writing checkpoint files. A checkpoint is data: what is neither a tensor, an array nor a
plain container becomes a placeholder that does nothing, and nothing in a file is ever run.
"""

from __future__ import annotations

import importlib
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nl_detectron.files import whole_file
from nl_detectron.validation import check_choice
from nl_detectron.weights.placeholder import NotDataError, Placeholder, placeholders_in
from nl_detectron.weights.unpickling import read_pickled

__all__ = [
    "STATE_DICT_KEYS",
    "CheckpointError",
    "load_checkpoint",
    "save_checkpoint",
    "unwrap_state_dict",
]

logger = logging.getLogger(__name__)

STATE_DICT_KEYS = (
    *("blobs", "model_state", "state_dict", "model", "module"),
    *("model_ema", "ema_state_dict", "state_dict_ema", "ema"),
)
"""
Where training programs keep the state dict: Caffe2, SlowFast, mmcv and Lightning, Detectron2,
DeepSpeed; and, if there is none, a moving average of it.
"""

# What torch.compile and checkpoint_wrapper put into names.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
_IN_NAMES = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPERS)})\.")


class CheckpointError(ValueError):
    """A file is no checkpoint, or none for this model; the message names it and says why."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """
    Read a checkpoint of any kind without running anything that is in it.

    Args:
        path: ``.safetensors``; ``.h5``, Keras's weights, which takes h5py; any other name for what
            ``torch.save`` wrote or a pickle of arrays, as in the model zoos of Detectron and
            Detectron2, possibly of Python 2.

    Returns:
        A state dict, or a dict that has one under one of :data:`STATE_DICT_KEYS`, of tensors on the
        CPU and NumPy's arrays. In the place of objects, such as an optimizer's or a config's, are
        placeholders, which are logged. Names from ``.h5`` are such as ``conv2d_1/kernel:0``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is corrupt, truncated, not a checkpoint, or has something else
            than a plain tensor or an array where a weight belongs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint {path} does not exist")
    read = _READERS.get(path.suffix.lower(), read_pickled)
    try:
        content = read(path)
        _check_weights(content)
    # The readers know only sound files: on others they fail with any error at all.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(
            f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict of names"
        )
    if names := ", ".join(placeholder.name for placeholder in placeholders_in(content)):
        logger.info(f"Not data, and left out of {path}: {names}")
    return content


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """
    Write a state dict so that Detectron2 loads it. The file appears complete or not at all.

    Args:
        checkpoint: a state dict, or a dict that has one under one of :data:`STATE_DICT_KEYS`. Its
            tensors and arrays are written, and nothing else.
        path: ``.pth`` for Detectron2's own form, ``{"model": state_dict}``, whose names have to be
            the model's; ``.pkl`` for the form of its model zoo, whose names may lack a prefix such
            as ``backbone.bottom_up``; ``.safetensors`` for the state dict alone. What NumPy has no
            type for, such as bfloat16, is written to a ``.pkl`` as float32.

    Raises:
        ValueError: ``path`` has another suffix, there are no tensors to write, or one of them
            cannot be written, such as a sparse one.
    """
    path = Path(path)
    check_choice(f"the suffix of {path}", path.suffix, tuple(_WRITERS))
    try:
        tensors = {
            name: as_tensor(name, value).detach().cpu()
            for name, value in unwrap_state_dict(checkpoint).items()
            if isinstance(value, (Tensor, np.ndarray))
        }
        if not tensors:
            raise ValueError(f"there are no tensors in {list(checkpoint)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft:
            _WRITERS[path.suffix](tensors, draft)
    except (TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not written: {' '.join(str(error).split())}") from error


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Find the state dict in a checkpoint.

    Args:
        checkpoint: what :func:`load_checkpoint` returns.

    Returns:
        The dict under one of :data:`STATE_DICT_KEYS`, or ``checkpoint`` itself if there is none.
    """
    return split_checkpoint(checkpoint)[0]


def split_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The state dict in a checkpoint, and all that is beside it, by name."""
    others: dict[str, Any] = {}
    for key in STATE_DICT_KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            others.update({name: value for name, value in checkpoint.items() if name != key})
            checkpoint = checkpoint[key]
    return checkpoint, others


def with_plain_names(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    A state dict without what wrappers add to names: ``module.`` of data-parallel training and of
    averaged models, where all names have it, and anywhere those of :data:`WRAPPERS`.
    """
    names = {name: _IN_NAMES.sub("", name) for name in state_dict}
    # An averaged model has a counter beside its module.
    while (dotted := [n for n in names.values() if "." in n]) and all(
        name.startswith("module.") for name in dotted
    ):
        names = {name: plain.removeprefix("module.") for name, plain in names.items()}
    if all(name == plain for name, plain in names.items()):
        return state_dict
    plain = OrderedDict((names[name], value) for name, value in state_dict.items())
    if len(plain) < len(names):
        raise CheckpointError("two of its tensors have the same name but for a wrapper's")
    return plain


def as_tensor(name: str, value: Any) -> Tensor:
    """A value of a state dict as a plain tensor; a ValueError says by its name what it is."""
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            native = np.asarray(value, value.dtype.newbyteorder("="), order="C")
            return torch.as_tensor(native)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is an array of {value.dtype}, not of numbers") from None
    if not isinstance(value, Tensor):
        objects = ", ".join(placeholder.name for placeholder in placeholders_in(value))
        kind = type(value).__name__ + (objects and f" with {objects}")
        kind = objects if isinstance(value, Placeholder) else kind
        raise ValueError(f"{name} is a {kind}, not a tensor")
    for kind, is_so in (
        ("a nested", value.is_nested),
        ("a sparse", value.layout != torch.strided),
        ("a quantised", value.is_quantized),
        ("an empty (meta)", value.is_meta),
    ):
        if is_so:
            raise ValueError(f"{name} is {kind} tensor, not a plain one of numbers")
    return value


def why_unsound(name: str, tensor: Tensor, own: Tensor | None) -> str:
    """Why a tensor cannot be the weights that a model has under its name; empty if it can."""
    if tensor.is_complex():
        return "is complex"
    if not tensor.is_floating_point():
        return "has integers" if own is not None and own.is_floating_point() else ""
    if tensor.dtype.itemsize == 1:  # float8, of which PyTorch computes nothing
        tensor = tensor.float()
    if not tensor.isfinite().all():
        return "has values that are not finite"
    if name.endswith("running_var") and (tensor < 0).any():
        return "has negative variances"
    return ""


def _check_weights(content: Any) -> None:
    """Raise if something that is no data is where weights belong."""
    places = {"": content}
    if isinstance(content, Mapping):
        places = dict(unwrap_state_dict(content))
        if places.keys() == content.keys():
            # Beside the tensors of a bare state dict may be anything that has no dot in its name.
            has_tensors = any(isinstance(v, (Tensor, np.ndarray)) for v in places.values())
            others = () if has_tensors else STATE_DICT_KEYS
            places = {n: v for n, v in places.items() if "." in str(n) or n in others}
    for name, value in places.items():
        for placeholder in placeholders_in(value):
            where = f"{name} in it" if name else "it"
            raise NotDataError(f"{where} {placeholder.why}")


def _write_pickle(tensors: dict[str, Tensor], path: Path) -> None:
    arrays = {name: _as_array(tensor) for name, tensor in tensors.items()}
    content = {"model": arrays, "__author__": "nl_detectron", "matching_heuristics": True}
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=4)


def _as_array(tensor: Tensor) -> np.ndarray:
    """As NumPy's type, or where there is none as float32 or complex64, which hold the values."""
    tensor = tensor.resolve_conj().resolve_neg()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32).numpy()


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    # Copies, because the format has no tensors that share memory.
    copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    safetensors.torch.save_file(copies, path)


def _read_keras(path: Path) -> Any:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise NotDataError("reading HDF5 takes h5py (pip install h5py)") from None
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
    ".safetensors": safetensors.torch.load_file,
}
_WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    ".pth": lambda tensors, path: torch.save({"model": tensors}, path),
    ".pkl": _write_pickle,
    ".safetensors": _write_safetensors,
}


def _reason(error: Exception) -> str:
    """What an error says in one line."""
    if isinstance(error, NotDataError):
        return str(error)
    if damaged := re.match(r"Bad CRC-32 for file '(.*)'", str(error)):
        return f"it is damaged: {damaged[1]} in it does not match its checksum"
    detail = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return f"it is damaged, or of another format ({detail})"
