"""From a checkpoint of any implementation to a :class:`Conversion`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from nl_detectron.validation import check_choice, did_you_mean
from nl_detectron.weights.block import Block
from nl_detectron.weights.checkpoint_io import as_tensor, split_checkpoint, with_plain_names
from nl_detectron.weights.conversion import Conversion, ConversionError, Options
from nl_detectron.weights.families import FAMILIES
from nl_detectron.weights.family import Family
from nl_detectron.weights.mmdetection import convert_detector, is_detector
from nl_detectron.weights.placeholder import placeholders_in
from nl_detectron.weights.reading import read_block
from nl_detectron.weights.resnets import (
    convert_torchvision,
    is_detectron2,
    is_torchvision,
    resnet_config,
)
from nl_detectron.weights.writing import write_block

# "torchvision" is a ResNet of torchvision or timm, "detectron2" what has its names already.
# "mmdetection" a whole detector.
SOURCES = (*FAMILIES, "torchvision", "detectron2", "mmdetection")
TARGETS = tuple(name for name, family in FAMILIES.items() if family.settings)

_IN_RESIDUAL_BRANCH = re.compile(r"(?:.*\.)?layer\d+\.\d+\..+")
# Of mmdetection's plug-ins, which may be after any convolution, and of timm's attention layers.
_PERHAPS_AFTER_CONV3 = re.compile(
    r"(?P<unit>(?:.*\.)?layer(?P<layer>[1-4])\.(?P<index>\d+))\.((context|nonlocal)_block\w*|se)"
)
_AFTER_CONV3 = re.compile(r"(?:.*\.)?res[2-5]\.\d+\.conv3\.nonlocal")


def convert(
    checkpoint: Mapping[str, Any],
    family: str | None = None,
    *,
    to: str = "nl_detectron",
    **options: Any,
) -> Conversion:
    """
    Convert weights so that they compute what they did. What neither the file nor the
    implementation's code settles has to be given as an option.

    Args:
        checkpoint: a state dict of tensors or NumPy arrays, a whole model's or a block's, or a
            checkpoint that has one under "blobs", "model_state", "state_dict" or "model".
        family: one of ``SOURCES``; by default recognised from the names.
        to: one of ``TARGETS``; other ones than "nl_detectron" take only non-local blocks.
        **options: the attributes of :class:`Options`; None is as if not given.

    Returns:
        The converted tensors, their settings, and what became of each tensor of the source.

    Raises:
        ConversionError: the weights are unknown or ambiguous, an option is missing, or the target
            cannot compute the same.
        ValueError: an argument, or the name of an option, is not among the legal ones.
    """
    check_choice("to", to, TARGETS)
    for name in options:
        check_choice("option", name, [option.name for option in fields(Options)])
    given = Options(**{name: value for name, value in options.items() if value is not None})
    tensors, others = _tensors_of(checkpoint)
    if family is None:
        family = recognise(tensors)
    check_choice("family", family, SOURCES)
    result = Conversion(family)
    for name, value in others.items():
        objects = ", ".join(placeholder.name for placeholder in placeholders_in(value))
        result.leave_out(name, value, f"not a tensor{objects and f', not data: {objects}'}")

    if to == "nl_detectron" and family in ("nl_detectron", "detectron2"):
        _copy(tensors, result)
    elif family in FAMILIES:
        _convert_blocks(tensors, FAMILIES[family], to, given, result)
    elif to != "nl_detectron":
        raise ConversionError(f"to {to!r} only non-local blocks are converted; there are none here")
    elif family == "torchvision":
        convert_torchvision(tensors, result)
    else:
        convert_detector(tensors, checkpoint.get("meta"), given.detector_config, result)
    return result


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """
    Tell whose names the tensors of a state dict have.

    Args:
        tensors: the state dict.

    Returns:
        One of ``SOURCES``.

    Raises:
        ConversionError: it is none of them, or could be several.
    """
    if is_detector(tensors):
        return "mmdetection"
    candidates = [name for name, family in FAMILIES.items() if family.find(tensors)]
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
    """The tensors of the state dict, by their names without wrappers; all the rest."""
    state_dict, others = split_checkpoint(checkpoint)
    arrays = {n: v for n, v in state_dict.items() if isinstance(v, (Tensor, np.ndarray))}
    others |= {name: value for name, value in state_dict.items() if name not in arrays}
    # Of tensors without values the shapes are enough.
    return {
        name: value if isinstance(value, Tensor) and value.is_meta else as_tensor(name, value)
        for name, value in with_plain_names(arrays).items()
    }, others


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
        result.settings = {"MODEL": {"RESNETS": resnet_config(bare)}}


def _convert_blocks(
    tensors: Mapping[str, Tensor], family: Family, to: str, options: Options, result: Conversion
) -> None:
    found, target = family.find(tensors), FAMILIES[to]
    if not found:
        raise ConversionError(f"there is no non-local block in {family.title}'s names")
    assert target.settings is not None  # TARGETS are those that have them
    for old in options.rename:
        if not any(b == old or (old and b.startswith(old + family.separator)) for b in found):
            raise ConversionError(
                f"there is no block {old!r} to rename; the blocks are "
                f"{', '.join(map(repr, found))}{did_you_mean(old, found)}"
            )
    if options.dims not in (None, *target.dims):
        raise ConversionError(
            f"{target.title}'s blocks are {target.dims[0]}-D, not {options.dims}-D"
        )
    options = replace(options, dims=options.dims or target.dims[0])

    written: dict[str, Block] = {}
    for block in found.values():
        where = _place(block, family, options.rename, tensors, result)
        if where is None:
            continue
        read_block(block, family, options, result)
        written[where], names = write_block(block, target)
        _add_block(written[where], names, where, result)
    if not written:
        raise ConversionError(f"no block can be converted: {result.rows[-1].note}")
    result.settings = target.settings(written, result.notes)

    handled = {row.source for row in result.rows}
    rest = {name: tensor for name, tensor in tensors.items() if name not in handled}
    for name in [n for n in rest if n.endswith(family.optimizer)]:
        result.leave_out(name, rest.pop(name), "the optimizer's")
    if family.convert_rest and to == "nl_detectron":
        family.convert_rest(rest, result)
    else:
        for name, tensor in rest.items():
            result.leave_out(name, tensor, "not a non-local block's")


def _place(
    block: Block,
    family: Family,
    rename: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    result: Conversion,
) -> str | None:
    """A block's name in our model; None if it has no place there, and is left out."""
    where = family.place(block.prefix, rename)
    if not _IN_RESIDUAL_BRANCH.fullmatch(block.prefix) or _AFTER_CONV3.fullmatch(where):
        return where
    note = f"{block.prefix} is within a residual block's branch, before its sum"
    if where != block.prefix:
        result.notes.append(f"NOT THE SAME NETWORK: {note}. {where} is the same block only.")
        return where
    if (place := _after_conv3(block, tensors)) is not None:
        return place
    for ours, name in block.origins.items():
        why = f"{note}, and the file does not tell that it is after conv3 (--rename takes it)"
        result.leave_out(name, block.tensors[ours], why)
    return None


def _after_conv3(block: Block, tensors: Mapping[str, Tensor]) -> str | None:
    """Its name in our model, if its name fits and its channels are conv3's, and no other's."""
    match = _PERHAPS_AFTER_CONV3.fullmatch(block.prefix)
    own = block.tensors.get(f"{block.embedding}.weight")
    if match is None or own is None:
        return None
    convs = [tensors.get(f"{match['unit']}.conv{i}.weight") for i in (1, 2, 3)]
    *others, width = [None if conv is None else conv.shape[0] for conv in convs]
    if own.shape[1:2] != (width,) or width in others:
        return None
    return f"res{int(match['layer']) + 1}.{match['index']}.conv3.nonlocal"


def _add_block(block: Block, names: Mapping[str, str], where: str, result: Conversion) -> None:
    for name, tensor in block.tensors.items():
        target = ".".join(filter(None, (where, names[name])))
        result.add(block.origins.get(name, ""), target, tensor, block.notes.get(name, ""))
    for name, source in block.origins.items():
        if name not in block.tensors:
            result.leave_out(source, None, block.notes[name])
