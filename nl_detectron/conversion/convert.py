"""From a checkpoint, whoever wrote it, to a :class:`Conversion`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nl_detectron.conversion.backbones import (
    check_resnet,
    convert_caffe2,
    convert_torchvision,
    is_detectron2,
    is_torchvision,
)
from nl_detectron.conversion.families import FAMILIES
from nl_detectron.conversion.finding import find_blocks, in_residual_branch, place
from nl_detectron.conversion.nonlocal_blocks import Block, read_block, write_block
from nl_detectron.conversion.options import Options
from nl_detectron.conversion.report import Conversion, ConversionError
from nl_detectron.conversion.settings import block_arguments, nonlocal_config
from nl_detectron.validation import check_choice, did_you_mean

# A ResNet of torchvision or timm (one form), and what has Detectron2's names already.
SOURCES = (*FAMILIES, "torchvision", "detectron2")
TARGETS = ("nl_detectron", "mmcv", "pytorchvideo")

# Under which key training programs keep the state dict: Caffe2, SlowFast, mmcv and Lightning,
# Detectron2.
_WRAPPERS = ("blobs", "model_state", "state_dict", "model")


def convert(
    checkpoint: Mapping[str, Any],
    family: str | None = None,
    *,
    to: str = "nl_detectron",
    pairwise: str | None = None,
    scale: bool | None = None,
    subsample: str | None = None,
    norm: str | None = None,
    norm_eps: float | None = None,
    dims: int | None = None,
    rename: Mapping[str, str] | None = None,
) -> Conversion:
    """
    Convert weights so that they compute what they did. What the file does not tell and the
    implementation leaves open has to be said.

    Args:
        checkpoint: a state dict of tensors or NumPy arrays, a whole model's or a block's, or a
            checkpoint that has one under "blobs", "model_state", "state_dict" or "model".
        family: one of ``SOURCES``; by default recognised from the names.
        to: one of ``TARGETS``; other ones than "nl_detectron" take only non-local blocks.
        pairwise, scale, subsample: what the source computes, in the words of
            :class:`NonLocalBlock`.
        norm: its norm, where the file has one without running statistics ("GN" or "LN"), or
            another of Detectron2's batch norms than "BN".
        norm_eps: epsilon of the source's batch norm, if it is not the implementation's default.
        dims: 1, 2 or 3; by default 2 for "nl_detectron", 3 for "pytorchvideo" and the source's for
            "mmcv".
        rename: the source's name of a block, or of what it is in, to the target's; "" is the root.

    Raises:
        ConversionError: the weights are unknown or ambiguous, something has to be said, or the
            target cannot compute the same.
        ValueError: an argument is not among the legal values.
    """
    check_choice("to", to, TARGETS)
    check_choice("dims", dims, (None, 1, 2, 3))
    tensors, others = _tensors_of(checkpoint)
    if family is None:
        family = recognise(tensors)
    check_choice("family", family, SOURCES)
    result = Conversion(family)
    for name, value in others.items():
        result.leave_out(name, value, "not a tensor")

    options = Options(pairwise, scale, subsample, norm, norm_eps, dims, rename or {})
    if to == "nl_detectron" and family in ("nl_detectron", "detectron2"):
        _copy(tensors, result)
    elif family in FAMILIES:
        _convert_blocks(tensors, family, to, options, result)
    elif to != "nl_detectron":
        raise ConversionError(f"to {to!r} only non-local blocks are converted; there are none here")
    elif family == "torchvision":
        convert_torchvision(tensors, result)
    return result


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """
    Which of ``SOURCES`` has such names.

    Raises:
        ConversionError: none, or several.
    """
    candidates = [name for name, family in FAMILIES.items() if find_blocks(tensors, family)]
    if is_torchvision(tensors):
        candidates.append("torchvision")
    if is_detectron2(tensors) and "nl_detectron" not in candidates:
        candidates.append("detectron2")
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        some = ", ".join(list(tensors)[:5]) or "nothing"
        raise ConversionError(
            f"neither a non-local block nor a ResNet of {', '.join(SOURCES)} is among the "
            f"{len(tensors)} tensors ({some}, ...)"
        )
    raise ConversionError(
        f"the names fit {' and '.join(candidates)}: say which is to be converted, with "
        f"family={' or '.join(map(repr, candidates))} (convert_weights.py: --family)"
    )


def _tensors_of(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the state dict, without "module." of data-parallel training; all the rest."""
    content: Mapping[str, Any] = checkpoint
    others: dict[str, Any] = {}
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            others.update({name: value for name, value in content.items() if name != key})
            content = content[key]
    tensors = {}
    for name, value in content.items():
        if isinstance(value, (Tensor, np.ndarray)):
            tensors[name] = torch.as_tensor(value)
        else:
            others[name] = value
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name[len("module.") :]: tensor for name, tensor in tensors.items()}
    return tensors, others


def _copy(tensors: Mapping[str, Tensor], result: Conversion) -> None:
    for name, tensor in tensors.items():
        result.add(name, name, tensor)
    result.notes.append(
        "Detectron2's names already: copied as it is. The file does not tell the input "
        "(INPUT.FORMAT, PIXEL_MEAN, PIXEL_STD), the stride (STRIDE_IN_1X1) and MODEL.NONLOCAL: "
        "keep those that it was trained with."
    )
    # A bare backbone tells its shape; a detector has its config.
    bare = {n: t for n, t in tensors.items() if n.startswith(("stem.", "res"))}
    if is_detectron2(bare):
        resnet = {n: t for n, t in bare.items() if ".nonlocal" not in n}
        result.settings = {"MODEL": {"RESNETS": check_resnet(resnet)}}


def _convert_blocks(
    tensors: Mapping[str, Tensor], source: str, to: str, options: Options, result: Conversion
) -> None:
    family, target = FAMILIES[source], FAMILIES[to]
    found = find_blocks(tensors, family)
    if not found:
        raise ConversionError(f"there is no non-local block in {family.title}'s names")
    _check_rename(options.rename, found, family.separator)
    if options.dims is None:
        options = Options(**{**vars(options), "dims": 2 if to == "nl_detectron" else target.dims})
    elif target.dims not in (None, options.dims):
        raise ConversionError(f"{target.title}'s blocks are {target.dims}-D, not {options.dims}-D")

    written: dict[str, Block] = {}
    for prefix, block_found in found.items():
        where = place(prefix, family, options.rename)
        if in_residual_branch(prefix):
            note = (
                f"{prefix} is within a residual block's branch, before its sum; our blocks are "
                "between residual blocks"
            )
            if where == prefix:
                for name, tensor in block_found.tensors.values():
                    result.leave_out(name, tensor, f"{note} (--rename takes it nevertheless)")
                continue
            result.notes.append(f"NOT THE SAME NETWORK: {note}. {where} is the same block only.")
        block = read_block(block_found, family, options, result.notes)
        written[where], names = write_block(block, target)
        _add_block(written[where], names, where, result)
    if not written:
        raise ConversionError(f"no block can be converted: {result.rows[-1].note}")
    if to == "nl_detectron":
        result.settings = {"MODEL": nonlocal_config(written, result.notes)}
    else:
        result.settings = {name: block_arguments(block, to) for name, block in written.items()}

    handled = {row.source for row in result.rows}
    rest = {name: tensor for name, tensor in tensors.items() if name not in handled}
    for name in [n for n in rest if n.endswith(family.not_weights)]:
        result.leave_out(name, rest.pop(name), "the optimizer's")
    if (source, to) == ("caffe2", "nl_detectron"):
        convert_caffe2(rest, result)
    else:
        for name, tensor in rest.items():
            result.leave_out(name, tensor, "not a non-local block's")


def _check_rename(rename: Mapping[str, str], found: Iterable[str], separator: str) -> None:
    blocks = list(found)
    for old in rename:
        if not any(b == old or (old and b.startswith(old + separator)) for b in blocks):
            raise ConversionError(
                f"there is no block {old!r} to rename; the blocks are "
                f"{', '.join(map(repr, blocks))}{did_you_mean(old, blocks)}"
            )


def _add_block(block: Block, names: Mapping[str, str], where: str, result: Conversion) -> None:
    for name, tensor in block.tensors.items():
        target = ".".join(filter(None, (where, names[name])))
        result.add(block.origins.get(name, ""), target, tensor, block.notes.get(name, ""))
    for name, source in block.origins.items():
        if name not in block.tensors:
            result.leave_out(source, None, block.notes[name])
