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
    names do not tell, and the caller has to; ``usual`` is what its code does by default.

    Attributes:
        title: its name for people.
        parts: what it calls the parts, by our names.
        scales: the pairwise functions that it has, and for those with a softmax, whether it
            multiplies the logits by d ** -0.5.
        refusal: why none of its blocks can be converted; "" if they can.
        subsample: the ways of subsampling that it has; the names of pooled parts tell which one a
            block has.
        leaves: their name of a parameter or buffer to ours.
        separator: between block, part and leaf.
        optimizer: how the names of the optimizer's tensors end.
        place_names: a pattern of their names of blocks that tell the place, and a template of ours.
        recognises: whether a block with these names is theirs; for names that two families share.
        no_bias: parts that may lack their bias; "out" with a norm never has one then.
        affine: a norm without statistics is one multiplication and addition per channel.
        norm_eps: epsilon of its batch norm.
        usual: what it does by default.
        assume_usual: all its published weights were made so.
        needs: what has all parts of one of these sets is a block.
        to_ours: changes a block of theirs, in our names, where ours computes another thing with it.
        convert_rest: converts the tensors that are no block's; None leaves them out.
        settings: what our blocks, by their names there, have to be built with there; may append to
            the list of notes. None: blocks are not written for it.
        dims: the dimensions that blocks are written in, the default first; None is the source's.
        norms: the norms that they are written with, in our words.
        to_theirs: changes a block of ours where another form is needed there.
    """

    title: str
    parts: Mapping[str, Part]
    scales: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    refusal: str = ""
    subsample: Sequence[str] = SUBSAMPLE
    leaves: Mapping[str, str] = field(default_factory=lambda: dict(zip(_LEAVES, _LEAVES)))
    separator: str = "."
    optimizer: tuple[str, ...] = ()
    place_names: tuple[str, str] = ("", "")
    recognises: Callable[[Sequence[str]], bool] = lambda names: True
    no_bias: Sequence[str] = ()
    affine: bool = False
    norm_eps: float = 1e-5
    usual: Mapping[str, Any] = field(default_factory=dict)
    assume_usual: bool = False
    needs: Sequence[frozenset[str]] = (frozenset({"g", "out"}),)
    to_ours: Callable[[Block], None] = lambda block: None
    convert_rest: Callable[[Mapping[str, Tensor], Conversion], None] | None = None
    settings: Callable[[Mapping[str, Block], list[str]], dict[str, Any]] | None = None
    dims: Sequence[int | None] = ()
    norms: Sequence[str] = ()
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
                self._add_part(block, part, module)
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

    def _add_part(self, block: Block, part: str, module: str) -> None:
        if module == self.parts[part].pooled:
            block.pooled.add(part)
        if block.parts.setdefault(part, module) != module:
            block.faults.append(
                f"it has both {block.parts[part]} and {module}, which are the same part in "
                f"different variants of {self.title}'s block"
            )

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
