"""What distinguishes one implementation of the non-local block from another, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nl_detectron.conversion.block import BATCH_NORMS, Block
from nl_detectron.conversion.report import Conversion
from nl_detectron.layers.nonlocal_block import SUBSAMPLE

_TORCH_LEAVES = {
    leaf: leaf for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}
EITHER = (True, False)
NO_SOFTMAX = ()


def leave_out_rest(tensors: Mapping[str, Tensor], result: Conversion) -> None:
    """
    Args:
        tensors: those of the file that are no non-local block's.
        result: gets a row for each.
    """
    for name, tensor in tensors.items():
        result.leave_out(name, tensor, "not a non-local block's")


Settings = Callable[[Mapping[str, Block], list[str]], dict[str, Any]]


def per_block(arguments: Callable[[Block], dict[str, Any]]) -> Settings:
    """
    Args:
        arguments: what to build one block with.

    Returns:
        A function for :attr:`Target.settings`: the arguments of each block, by its name.
    """
    return lambda blocks, notes: {name: arguments(block) for name, block in blocks.items()}


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
    settings: Settings
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
        place: their name of a block (a pattern) and ours (a template).
        recognises: whether a block with these names is theirs; for names that two families share.
        no_bias: parts that may lack their bias; "out" with a norm never has one then.
        affine: a norm without statistics is one multiplication and addition per channel.
        norm_eps: epsilon of its batch norm.
        usual: what it does by default.
        assume_usual: all its published weights were made so.
        adapt: changes a block of theirs, in our names, where ours computes another thing with it.
        convert_rest: what to do with the tensors that are no block's.
        target: what it takes to write blocks for it; None where this cannot be done.
    """

    title: str
    modules: Mapping[str, str]
    scales: Mapping[str, Sequence[bool]]
    subsample: Sequence[str] = SUBSAMPLE
    leaves: Mapping[str, str] = field(default_factory=lambda: _TORCH_LEAVES)
    separator: str = "."
    optimizer: tuple[str, ...] = ()
    place: tuple[str, str] | None = None
    recognises: Callable[[Sequence[str]], bool] = lambda names: True
    no_bias: Sequence[str] = ()
    affine: bool = False
    norm_eps: float = 1e-5
    usual: Mapping[str, Any] = field(default_factory=dict)
    assume_usual: bool = False
    adapt: Callable[[Block], None] = lambda block: None
    convert_rest: Callable[[Mapping[str, Tensor], Conversion], None] = leave_out_rest
    target: Target | None = None

    def parts(self) -> dict[str, str]:
        """Their names of the parts to ours."""
        return {theirs: key.split()[0] for key, theirs in self.modules.items()}

    def pattern(self) -> re.Pattern[str]:
        """Matches a full name; groups: block (None at the root), part, leaf."""
        separator = re.escape(self.separator)
        parts = "|".join(map(re.escape, self.modules.values()))
        leaves = "|".join(map(re.escape, self.leaves))
        return re.compile(rf"(?:(.*){separator})?({parts}){separator}({leaves})")
