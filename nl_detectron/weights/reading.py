"""Blocks of any implementation into our terms: what they compute, and our names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nl_detectron.validation import check_choice
from nl_detectron.weights.block import (
    AFFINE_NOTE,
    BATCH_NORMS,
    CONVS,
    OUR_EPS,
    PUBLISHED_TEMPERATURE,
    Block,
    Traits,
    affine_statistics,
)
from nl_detectron.weights.conversion import Conversion, ConversionError, Options
from nl_detectron.weights.family import Family

# The first of these parts that a block has tells which pairwise functions are possible.
_KINDS = {
    "reduce": ("global_context",),
    "unary": ("disentangled",),
    "concat": ("concatenation",),
    "theta": ("embedded_gaussian", "dot_product"),
    "g": ("gaussian",),
}


def read_block(block: Block, family: Family, options: Options, result: Conversion) -> None:
    """
    Settle what a block computes, and change its tensors so that ours, of ``options.dims``
    dimensions, computes the same. What is assumed becomes a note of the result; an error names the
    block.
    """
    try:
        if block.faults:
            raise ConversionError(block.faults[0])
        block.traits = _Settling(block, family, options, result).traits()
        counter = "norm.num_batches_tracked"
        if block.traits.norm == "FrozenBN" and block.tensors.pop(counter, None) is not None:
            block.notes[counter] = "a counter that a frozen batch norm does not have"
        convs = {part: sizes for part, sizes in CONVS.items() if part in block.parts}
        _add_biases(block, convs, family)
        _reshape_convs(block, convs, options.dims)
        family.to_ours(block)
        _check_norm(block)
        _carry_norm(block, family.norm_eps if options.norm_eps is None else options.norm_eps)
    except ConversionError as error:
        raise ConversionError(f"{block.title}: {error}") from error


@dataclass
class _Settling:
    """What a block computes, by its names, the family and the options; and what is left open."""

    block: Block
    family: Family
    options: Options
    result: Conversion
    open: dict[str, Sequence[Any]] = field(default_factory=dict)

    def traits(self) -> Traits:
        kinds = self._kinds()
        pairwise = self._settle("pairwise", kinds)
        # Where there is no softmax there is no scale; True is the config's default.
        scales = self.family.scales[pairwise or kinds[0]]
        scale = self._settle("scale", scales) if scales else True
        subsample = self._settle("subsample", self._subsample())
        traits = Traits(pairwise, scale, subsample, self._norm(), self._temperature(pairwise))
        if not self.open:
            return traits
        usual = self.family.usual
        texts = [
            f"{key}={' or '.join(map(repr, legal))}"
            + (f" ({self.family.title}'s default: {usual[key]!r})" if key in usual else "")
            for key, legal in self.open.items()
        ]
        raise ConversionError(
            f"the file does not tell {'; '.join(texts)}. Say how the model was built "
            f"(convert_weights.py: {', '.join(f'--{key}' for key in self.open)})"
        )

    def _settle(self, key: str, legal: Sequence[Any]) -> Any:
        """The value among ``legal`` that the option, the names or the family settle, else None."""
        given = getattr(self.options, key)
        if given is not None:
            check_choice(key, given, legal)
            return given
        if len(legal) == 1:
            return legal[0]
        if not self.family.assume_usual:
            self.open[key] = legal
            return None
        usual = self.family.usual[key]
        others = " or ".join(repr(value) for value in legal if value != usual)
        self.result.note_once(
            f"The file does not say {key}; assumed is {usual!r}, as {self.family.title} has it "
            f"unless told otherwise. If this was told otherwise: {key}={others}."
        )
        return usual

    def _temperature(self, pairwise: str) -> float:
        if pairwise == "disentangled" and self.options.temperature is None:
            self.result.note_once(
                f"The file does not say temperature; assumed is {PUBLISHED_TEMPERATURE}, as all "
                "published blocks have it."
            )
        return self.options.temperature or PUBLISHED_TEMPERATURE

    def _kinds(self) -> Sequence[str]:
        parts, family = self.block.parts, self.family
        kinds = next(kinds for part, kinds in _KINDS.items() if part in parts)
        had = [kind for kind in kinds if kind in family.scales]
        if not had:
            raise ConversionError(
                f"with the parts {', '.join(sorted(parts))} it would be a {kinds[0]} block, "
                f"which {family.title} does not have: it is incomplete"
            )
        return had

    def _subsample(self) -> Sequence[str]:
        if self.block.is_context:
            return ("none",)
        telling = [part for part in self.block.parts if self.family.parts[part].pooled]
        if not telling:
            return self.family.subsample
        pooled = [part for part in telling if part in self.block.pooled]
        if pooled and pooled != telling:
            raise ConversionError(f"of phi and g only {', '.join(pooled)} is subsampled")
        return ("embeddings",) if pooled else ("none",)

    def _norm(self) -> str:
        given = self.options.norm
        if self.block.is_context:
            return "LN"
        if "norm" not in self.block.parts:
            legal: tuple[str, ...] = ("",)
        elif "norm.running_var" in self.block.tensors:
            legal = BATCH_NORMS
        elif self.family.affine:
            legal = ("FrozenBN",)
        elif given is not None:
            legal = ("GN", "LN")
        else:
            raise ConversionError(
                "its norm has no running statistics, and the file does not say what it is: say "
                "norm='GN' if it is group norm with 32 groups, norm='LN' if it is layer norm over "
                "the channels of each position; another one cannot be converted"
            )
        if given is None:
            return legal[0]
        check_choice("norm", given, legal)
        return given


def _add_biases(block: Block, convs: Iterable[str], family: Family) -> None:
    """Zeros where the family may lack a bias."""
    for part in convs:
        weight = block.tensors.get(f"{part}.weight")
        if weight is None:
            raise ConversionError(f"{part} has no weight: it is incomplete")
        if part == "concat" or f"{part}.bias" in block.tensors:
            continue
        if part not in family.no_bias:
            raise ConversionError(f"{part} has no bias: it is incomplete")
        note = f"zeros, as the {part} of {family.title} has no bias here"
        block.change(f"{part}.bias", weight.new_zeros(weight.shape[0]), note)


def _reshape_convs(block: Block, convs: Mapping[str, str], dims: int | None) -> None:
    """Kernels of size 1 in ``dims`` dimensions (None: those of the file)."""
    block.dims_in_file = len(block.shape) - 2
    if block.dims_in_file < 1:
        raise ConversionError(
            f"{block.embedding} has shape {block.shape}, which is no convolution's"
        )
    inner, channels = block.inner_channels, block.in_channels
    sizes = {"1": 1, "C": channels, "d": inner, "D": 2 * inner}
    ones = (1,) * (dims or block.dims_in_file)
    for part, letters in convs.items():
        name = f"{part}.weight"
        weight, shape = block.tensors[name], tuple(sizes[letter] for letter in letters)
        if tuple(weight.shape) != shape + (1,) * (weight.dim() - 2):
            raise ConversionError(
                f"{part} has shape {tuple(weight.shape)}, but must be a 1x1 convolution of shape "
                f"{shape}: {block.embedding} has {channels} channels in and {inner} out"
            )
        block.tensors[name] = weight.reshape(shape + ones)
        if weight.dim() != len(shape + ones):
            block.notes[name] = f"{weight.dim()}-D weight (kernel 1) as {len(shape + ones)}-D"


def _check_norm(block: Block) -> None:
    norm = {n: t for n, t in block.tensors.items() if n.startswith("norm.") and t.dim()}
    channels = block.inner_channels if block.is_context else block.in_channels
    for name, tensor in norm.items():
        if tuple(tensor.shape) != (channels,):
            raise ConversionError(
                f"{name} has shape {tuple(tensor.shape)}, but must have ({channels},)"
            )
    needed = {"norm.weight", "norm.bias"} if block.traits.norm else set()
    if block.traits.norm in BATCH_NORMS and not block.is_affine:
        needed |= {"norm.running_mean", "norm.running_var"}
    if missing := needed - set(norm):
        raise ConversionError(f"it has no {', '.join(sorted(missing))}: it is incomplete")


def _carry_norm(block: Block, eps: float) -> None:
    """Our epsilon, and our form of an affine layer."""
    if block.traits.norm not in BATCH_NORMS:
        return
    if block.is_affine:
        for leaf, tensor in affine_statistics(block.tensors["norm.weight"]).items():
            block.change(f"norm.{leaf}", tensor, AFFINE_NOTE)
    elif eps != OUR_EPS:
        variance = block.tensors["norm.running_var"] + (eps - OUR_EPS)
        if (variance < 0).any():
            raise ConversionError(
                f"eps {eps} of its batch norm cannot be carried over to {OUR_EPS}: a variance "
                "would be negative"
            )
        note = f"plus {eps - OUR_EPS:.3g}: eps is {eps:.8g} there"
        block.change("norm.running_var", variance, note)
