"""What distinguishes one implementation of our blocks from another, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nl_detectron.layers import SUBSAMPLE
from nl_detectron.weights.block import Block
from nl_detectron.weights.report import Conversion

_TORCH_LEAVES = {
    leaf: leaf for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}
EITHER = (True, False)
# Pairwise functions that have no logits to scale.
NO_SOFTMAX: Mapping[str, Sequence[bool]] = {"dot_product": (), "concatenation": ()}


@dataclass(frozen=True)
class Target:
    """
    What it takes to write blocks for an implementation.

    Attributes:
        dims: the dimensions that its blocks can have, the default first; None is the source's.
        norms: the norms that they can have, in our words.
        settings: what our blocks, by their names there, have to be built with there; may append to
            the list of notes.
        adapt: changes a block of ours where another form than ours is needed.
    """

    dims: Sequence[int | None]
    norms: Sequence[str]
    settings: Callable[[Mapping[str, Block], list[str]], dict[str, Any]]
    adapt: Callable[[Block], None] = lambda block: None


@dataclass(frozen=True)
class Family:
    """
    An implementation. Where it leaves open what a block computes, the names do not tell, and the
    caller has to; ``usual`` holds what its code does by default.

    Attributes:
        title: its name for people.
        modules: our name of a part to theirs. A part with two names has a second key: "phi pooled"
            and "g pooled" are for blocks that subsample, "norm GN" is for group norm; another
            second word is for reading only.
        scales: the pairwise functions that it has, and for those with a softmax, whether it
            multiplies the logits by d ** -0.5.
        subsample: the ways of subsampling that it has; "phi pooled" tells which one a block has.
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
        adapt: changes a block of theirs, in our names, where ours computes another thing with it.
        needs: what has all parts of one of these sets is a block.
        refusal: why none of its blocks can be converted; "" if they can.
        convert_rest: converts the tensors that are no block's; None leaves them out.
        target: what it takes to write blocks for it; None where this cannot be done.
    """

    title: str
    modules: Mapping[str, str]
    scales: Mapping[str, Sequence[bool]]
    subsample: Sequence[str] = SUBSAMPLE
    leaves: Mapping[str, str] = field(default_factory=lambda: _TORCH_LEAVES)
    separator: str = "."
    optimizer: tuple[str, ...] = ()
    place_names: tuple[str, str] = ("", "")
    recognises: Callable[[Sequence[str]], bool] = lambda names: True
    no_bias: Sequence[str] = ()
    affine: bool = False
    norm_eps: float = 1e-5
    usual: Mapping[str, Any] = field(default_factory=dict)
    assume_usual: bool = False
    adapt: Callable[[Block], None] = lambda block: None
    needs: Sequence[frozenset[str]] = (frozenset({"g", "out"}),)
    refusal: str = ""
    convert_rest: Callable[[Mapping[str, Tensor], Conversion], None] | None = None
    target: Target | None = None

    def find(self, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
        """
        Args:
            tensors: a state dict; what is no block's is ignored.

        Returns:
            Its blocks by their names in the file, with what is wrong with each.
        """
        pattern = self._pattern()
        found: dict[str, Block] = {}
        for name, tensor in tensors.items():
            match = pattern.fullmatch(name)
            if match:
                prefix, module, leaf = match.groups(default="")
                self._add(found.setdefault(prefix, Block(prefix)), module, leaf, name, tensor)
        blocks = {p: b for p, b in found.items() if any(n <= set(b.parts) for n in self.needs)}
        if not self.recognises([name for b in blocks.values() for name in b.origins.values()]):
            return {}
        for block in blocks.values():
            self._find_faults(block, tensors)
        return blocks

    def place(self, prefix: str, rename: Mapping[str, str]) -> str:
        """
        Args:
            prefix: the name of a block in the file.
            rename: new names of blocks, or of what they are in, by the old ones.

        Returns:
            Its name in our model, as ``rename`` has it, or where the name tells its place.
        """
        for old, new in rename.items():
            if prefix == old or (old and prefix.startswith(old + self.separator)):
                rest = prefix[len(old) :]
                return new + rest if new else rest.lstrip(self.separator)
        pattern, template = self.place_names
        match = re.fullmatch(pattern, prefix)
        return match.expand(template) if match else prefix

    def _pattern(self) -> re.Pattern[str]:
        """Matches a full name; groups: block (None at the root), module, leaf."""
        separator = re.escape(self.separator)
        modules = "|".join(map(re.escape, self.modules.values()))
        leaves = "|".join(map(re.escape, self.leaves))
        return re.compile(rf"(?:(.*){separator})?({modules}){separator}({leaves})")

    def _add(self, block: Block, module: str, leaf: str, name: str, tensor: Tensor) -> None:
        part = next(key.split()[0] for key, theirs in self.modules.items() if theirs == module)
        if block.parts.setdefault(part, module) != module:
            block.faults.append(
                f"it has both {block.parts[part]} and {module}, which are the same part in "
                f"different variants of {self.title}'s block"
            )
        ours = f"{part}.{self.leaves[leaf]}"
        block.tensors[ours], block.origins[ours] = tensor, name

    def _find_faults(self, block: Block, names: Iterable[str]) -> None:
        if self.refusal:
            block.faults.append(self.refusal)
        if ("theta" in block.parts) != ("phi" in block.parts):
            block.faults.append("only one of theta and phi is there: it is incomplete")
        start = block.prefix and block.prefix + self.separator
        known = {*block.origins.values()}
        for name in names:
            if name.startswith(start) and name not in known and not name.endswith(self.optimizer):
                block.faults.append(
                    f"{name} is no part of {self.title}'s block, so with it the block computes "
                    "something else"
                )
