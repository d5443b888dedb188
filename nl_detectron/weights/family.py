"""What distinguishes one implementation of our blocks from another, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from nl_detectron.layers import SUBSAMPLE
from nl_detectron.weights.block import Block, Traits
from nl_detectron.weights.conversion import Conversion

_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Part(NamedTuple):
    """What an implementation calls a part: in general, and in blocks that subsample or have GN."""

    name: str
    pooled: str = ""
    group_norm: str = ""
    read_only: str = ""  # another name of the same part, in blocks that are only read

    def name_in(self, traits: Traits) -> str:
        """Its name in a block that computes this."""
        pooled = self.pooled if traits.subsample == "embeddings" else ""
        return (self.group_norm if traits.norm == "GN" else "") or pooled or self.name


@dataclass(frozen=True)
class Family:
    """
    An implementation, for reading and writing. Where it leaves open what a block computes, the
    names do not tell, and the caller has to. Blocks are written for those that have ``settings``.
    """

    title: str  # its name for people
    parts: Mapping[str, Part]  # what it calls the parts, by our names
    # Its pairwise functions, and whether it multiplies the logits of a softmax by d ** -0.5.
    scales: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    refusal: str = ""  # why none of its blocks can be converted
    subsample: Sequence[str] = SUBSAMPLE  # names of pooled parts tell which a block has
    leaves: Mapping[str, str] = field(default_factory=lambda: dict(zip(_LEAVES, _LEAVES)))
    separator: str = "."  # between block, part and leaf
    optimizer: tuple[str, ...] = ()  # how the names of the optimizer's tensors end
    place_names: tuple[str, str] = ("", "")  # pattern of names that tell the place, our template
    # Whether a block with these names is theirs, where two families share names.
    recognises: Callable[[Sequence[str]], bool] = lambda names: True
    no_bias: Sequence[str] = ()  # what may lack a bias; "out" with a norm never has one then
    affine: bool = False  # a norm without statistics multiplies and adds by channel, no more
    norm_eps: float = 1e-5
    usual: Mapping[str, Any] = field(default_factory=dict)  # what its code does by default
    assume_usual: bool = False  # all its published weights were made so
    # What has all parts of one of these sets is a block.
    needs: Sequence[frozenset[str]] = (frozenset({"g", "out"}),)
    # Changes a block of theirs, in our names, where ours computes another thing with it.
    to_ours: Callable[[Block], None] = lambda block: None
    # Converts the tensors that are no block's; None leaves them out.
    convert_rest: Callable[[Mapping[str, Tensor], Conversion], None] | None = None
    # For writing: what our blocks, by their names there, have to be built with there; notes may be
    # appended. Then the dimensions (the default first; None is the source's), and our norms.
    settings: Callable[[Mapping[str, Block], list[str]], dict[str, Any]] | None = None
    dims: Sequence[int | None] = ()
    norms: Sequence[str] = ()
    # Changes a block of ours where another form is needed there.
    to_theirs: Callable[[Block], None] = lambda block: None

    def find(self, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
        """Its blocks in a state dict, by their names there, with what is wrong with each."""
        separator = re.escape(self.separator)
        modules = {name: key for key, part in self.parts.items() for name in part if name}
        pattern = re.compile(
            rf"(?:(.*){separator})?({'|'.join(map(re.escape, modules))}){separator}"
            rf"({'|'.join(map(re.escape, self.leaves))})"
        )
        found: dict[str, Block] = {}
        for name, tensor in tensors.items():
            if match := pattern.fullmatch(name):
                prefix, module, leaf = match.groups(default="")
                block, part = found.setdefault(prefix, Block(prefix)), modules[module]
                if module == self.parts[part].pooled:
                    block.pooled.add(part)
                if block.parts.setdefault(part, module) != module:
                    block.faults.append(
                        f"it has both {block.parts[part]} and {module}, which are the same part in "
                        f"different variants of {self.title}'s block"
                    )
                ours = f"{part}.{self.leaves[leaf]}"
                block.tensors[ours], block.origins[ours] = tensor, name
        blocks = {p: b for p, b in found.items() if any(n <= set(b.parts) for n in self.needs)}
        if not self.recognises([name for b in blocks.values() for name in b.origins.values()]):
            return {}
        for block in blocks.values():
            self._find_faults(block, tensors)
        return blocks

    def place(self, prefix: str, rename: Mapping[str, str]) -> str:
        """A block's name in our model: as ``rename`` has it, or where its name tells its place."""
        for old, new in rename.items():
            if prefix == old or (old and prefix.startswith(old + self.separator)):
                rest = prefix[len(old) :]
                return new + rest if new else rest.lstrip(self.separator)
        pattern, template = self.place_names
        match = re.fullmatch(pattern, prefix)
        return match.expand(template) if match else prefix

    def _find_faults(self, block: Block, names: Iterable[str]) -> None:
        if self.refusal:
            block.faults.append(self.refusal)
        if ("theta" in block.parts) != ("phi" in block.parts):
            block.faults.append("only one of theta and phi is there: it is incomplete")
        start = block.prefix and block.prefix + self.separator
        known = {*block.origins.values()}
        block.faults += [
            f"{name} is no part of {self.title}'s block, so with it the block computes something "
            "else"
            for name in names
            if name.startswith(start) and name not in known and not name.endswith(self.optimizer)
        ]
