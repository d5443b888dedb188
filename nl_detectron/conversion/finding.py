"""Finding the non-local blocks in a checkpoint, and their place in our model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nl_detectron.conversion.family import Family

# mmdet's plug-ins and timm's attention layers: within a residual block, before its sum.
_IN_RESIDUAL_BRANCH = re.compile(r"(?:.*\.)?layer\d+\.\d+\..+")


@dataclass
class FoundBlock:
    """
    A block as it is in the file.

    Attributes:
        prefix: its name; empty at the root.
        tensors: by our names ("theta.weight").
        origins: their names in the file, by ours.
        parts: our names of the parts it has to the family's.
        faults: what is wrong with it.
    """

    prefix: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def find_blocks(tensors: Mapping[str, Tensor], family: Family) -> dict[str, FoundBlock]:
    """
    Args:
        tensors: a state dict; what is no block's is ignored.
        family: whose blocks to look for.

    Returns:
        The blocks by their names in the file, with what is wrong with each.
    """
    pattern, parts = family.pattern(), family.parts()
    found: dict[str, FoundBlock] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match:
            prefix, theirs, leaf = match.groups(default="")
            block, part = found.setdefault(prefix, FoundBlock(prefix)), parts[theirs]
            if block.parts.setdefault(part, theirs) != theirs:
                block.faults.append(
                    f"it has both {block.parts[part]} and {theirs}, which are the same part in "
                    f"different variants of {family.title}'s block"
                )
            ours = f"{part}.{family.leaves[leaf]}"
            block.tensors[ours], block.origins[ours] = tensor, name
    blocks = {p: b for p, b in found.items() if {"g", "out"} <= set(b.parts)}
    if not family.recognises([name for b in blocks.values() for name in b.origins.values()]):
        return {}
    for block in blocks.values():
        block.faults += _faults(block, tensors, family)
    return blocks


def place(prefix: str, family: Family, rename: Mapping[str, str]) -> str:
    """
    Args:
        prefix: the name of a block in the file.
        family: whose block it is.
        rename: new names of blocks, or of what they are in, by the old ones.

    Returns:
        Its name in our model, as ``rename`` has it, or where the family's names tell its place.
    """
    for old, new in rename.items():
        if prefix == old or (old and prefix.startswith(old + family.separator)):
            rest = prefix[len(old) :]
            return new + rest if new else rest.lstrip(family.separator)
    match = family.place and re.fullmatch(family.place[0], prefix)
    return match.expand(family.place[1]) if family.place and match else prefix


def in_residual_branch(prefix: str) -> bool:
    """Whether a block of this name is part of a residual block, not between two of them."""
    return bool(_IN_RESIDUAL_BRANCH.fullmatch(prefix))


def _faults(block: FoundBlock, names: Iterable[str], family: Family) -> list[str]:
    """Parts that are missing, and tensors below the block that are not the block's."""
    faults = []
    if ("theta" in block.parts) != ("phi" in block.parts):
        faults.append("only one of theta and phi is there: it is incomplete")
    start = block.prefix and block.prefix + family.separator
    known = {*block.origins.values()}
    for name in names:
        if name.startswith(start) and name not in known and not name.endswith(family.optimizer):
            faults.append(
                f"{name} is no part of {family.title}'s block, so with it the block computes "
                "something else"
            )
    return faults
