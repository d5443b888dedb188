"""Finding the non-local blocks in a checkpoint, and their place in our model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nl_detectron.conversion.families import Family

# mmdet's plug-ins and timm's attention layers: within a residual block, before its sum.
_IN_RESIDUAL_BRANCH = re.compile(r"(?:.*\.)?layer\d+\.\d+\..+")


@dataclass
class FoundBlock:
    """
    A block's tensors as they are in the file: (part, leaf), in our words, to name and tensor; the
    parts, our names to theirs; and what is wrong with it.
    """

    prefix: str
    tensors: dict[tuple[str, str], tuple[str, Tensor]] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def leaves(self, part: str) -> list[str]:
        return [leaf for other, leaf in self.tensors if other == part]


def find_blocks(tensors: Mapping[str, Tensor], family: Family) -> dict[str, FoundBlock]:
    """The blocks among ``tensors``, by their name in the file; what else there is is ignored."""
    pattern, parts = family.pattern(), family.parts()
    found: dict[str, FoundBlock] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match:
            prefix, theirs, leaf = match.groups(default="")
            block = found.setdefault(prefix, FoundBlock(prefix))
            part, key = parts[theirs], (parts[theirs], family.leaves[leaf])
            if block.parts.setdefault(part, theirs) != theirs:
                block.faults.append(
                    f"it has both {block.parts[part]} and {theirs}, which are the same part in "
                    f"different variants of {family.title}'s block"
                )
            block.tensors[key] = (name, tensor)
    blocks = {p: b for p, b in found.items() if {"g", "out"} <= set(b.parts)}
    names = [name for block in blocks.values() for name, _ in block.tensors.values()]
    if not family.recognises(names):
        return {}
    for block in blocks.values():
        if ("theta" in block.parts) != ("phi" in block.parts):
            block.faults.append("only one of theta and phi is there: it is incomplete")
        for name in _unknown_within(block, tensors, family):
            block.faults.append(
                f"{name} is no part of {family.title}'s block, so with it the block computes "
                "something else"
            )
    return blocks


def place(prefix: str, family: Family, rename: Mapping[str, str]) -> str:
    """The name of a block in our model: as ``rename`` has it, or where the family's names say."""
    for old, new in rename.items():
        if prefix == old or (old and prefix.startswith(old + family.separator)):
            rest = prefix[len(old) :]
            return new + rest if new else rest.lstrip(family.separator)
    if family.places:
        pattern, template = family.places
        match = re.fullmatch(pattern, prefix)
        if match:
            return match.expand(template)
    return prefix


def in_residual_branch(prefix: str) -> bool:
    """Whether a block of this name is part of a residual block, not between two of them."""
    return bool(_IN_RESIDUAL_BRANCH.fullmatch(prefix))


def _unknown_within(block: FoundBlock, names: Iterable[str], family: Family) -> list[str]:
    """Tensors below the block that are not the block's (mmcv's disentangled one has another)."""
    known = {name for name, _ in block.tensors.values()}
    start = block.prefix and block.prefix + family.separator
    return [
        name
        for name in names
        if name.startswith(start) and name not in known and not name.endswith(family.not_weights)
    ]
