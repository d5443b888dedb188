"""Blocks of any implementation into our terms: what they compute, and our names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nl_detectron.validation import check_choice
from nl_detectron.weights.block import (
    AFFINE_NOTE,
    BATCH_NORMS,
    OUR_EPS,
    PUBLISHED_TEMPERATURE,
    Block,
    Traits,
    affine_statistics,
)
from nl_detectron.weights.family import Family
from nl_detectron.weights.options import Options
from nl_detectron.weights.report import ConversionError

# The convolutions, with their channels out and in: C of the block, d inside, D = 2 d.
_CONVS = {"theta": "dC", "phi": "dC", "g": "dC", "concat": "1D", "unary": "1C", "out": "Cd"}
_CONVS.update(context="1C", reduce="dC")
# The first of these parts that a block has tells which pairwise functions are possible.
_KINDS = {
    "reduce": ("global_context",),
    "unary": ("disentangled",),
    "concat": ("concatenation",),
    "theta": ("embedded_gaussian", "dot_product"),
    "g": ("gaussian",),
}


def read_block(block: Block, family: Family, options: Options, notes: list[str]) -> None:
    """
    Settle what a block computes, and change its tensors so that ours computes the same.

    Args:
        block: as it was found.
        family: whose block it is.
        options: what the caller knows about it; ``dims`` are those of the result.
        notes: gets one for each thing that was assumed.

    Raises:
        ConversionError: it is incomplete, an option is missing, or ours cannot compute the same.
        ValueError: an option contradicts the names.
    """
    try:
        if block.faults:
            raise ConversionError(block.faults[0])
        block.traits = _settle_traits(block, family, options, notes)
        _drop_counter(block)
        convs = [part for part in _CONVS if part in block.parts]
        _add_biases(block, convs, family)
        _reshape_convs(block, convs, options.dims)
        family.adapt(block)
        _check_norm(block)
        _carry_norm(block, family.norm_eps if options.norm_eps is None else options.norm_eps)
    except ConversionError as error:
        raise ConversionError(f"{block.prefix or 'the block'}: {error}") from error


def _settle_traits(block: Block, family: Family, options: Options, notes: list[str]) -> Traits:
    legal: dict[str, Sequence[Any]] = {"pairwise": _pairwise_of(block, family)}
    pairwise = _settle("pairwise", legal["pairwise"], family, options, notes)
    # Where there is no softmax there is no scale; True is the config's default.
    scale: Any = True
    scales = family.scales[pairwise or legal["pairwise"][0]]
    if scales:
        legal["scale"] = scales
        scale = _settle("scale", scales, family, options, notes)
    legal["subsample"] = _subsample_of(block, family)
    subsample = _settle("subsample", legal["subsample"], family, options, notes)
    norm = _norm_of(block, family, options)
    temperature = _temperature_of(pairwise, family, options, notes)
    traits = Traits(pairwise, scale, subsample, norm, temperature)
    unsettled = {key: legal[key] for key, value in traits._asdict().items() if value is None}
    if unsettled:
        raise ConversionError(_what_is_missing(family, unsettled))
    return traits


def _settle(
    key: str, legal: Sequence[Any], family: Family, options: Options, notes: list[str]
) -> Any:
    """The value among ``legal`` that the option, the names or the family settle, else None."""
    given = getattr(options, key)
    if given is not None:
        check_choice(key, given, legal)
        return given
    if len(legal) == 1:
        return legal[0]
    if not family.assume_usual:
        return None
    usual = family.usual[key]
    others = " or ".join(repr(value) for value in legal if value != usual)
    note = (
        f"The file does not say {key}; assumed is {usual!r}, as {family.title} has it unless told "
        f"otherwise. If this was told otherwise: {key}={others}."
    )
    if note not in notes:
        notes.append(note)
    return usual


def _temperature_of(pairwise: str, family: Family, options: Options, notes: list[str]) -> float:
    if pairwise == "disentangled" and options.temperature is None:
        note = (
            f"The file does not say temperature; assumed is {PUBLISHED_TEMPERATURE}, as all "
            "published blocks have it."
        )
        if note not in notes:
            notes.append(note)
    return options.temperature or PUBLISHED_TEMPERATURE


def _what_is_missing(family: Family, unsettled: Mapping[str, Sequence[Any]]) -> str:
    lines = []
    for key, legal in unsettled.items():
        usual = f" ({family.title}'s default: {family.usual[key]!r})" if key in family.usual else ""
        lines.append(f"{key}={' or '.join(map(repr, legal))}{usual}")
    flags = ", ".join(f"--{key}" for key in unsettled)
    return (
        f"the file does not tell {'; '.join(lines)}. Say how the model was built "
        f"(convert_weights.py: {flags})"
    )


def _pairwise_of(block: Block, family: Family) -> Sequence[str]:
    kinds = next(kinds for part, kinds in _KINDS.items() if part in block.parts)
    had = [kind for kind in kinds if kind in family.scales]
    if not had:
        raise ConversionError(
            f"with the parts {', '.join(sorted(block.parts))} it would be a {kinds[0]} block, "
            f"which {family.title} does not have: it is incomplete"
        )
    return had


def _subsample_of(block: Block, family: Family) -> Sequence[str]:
    if block.is_context:
        return ("none",)
    pooled = {part: family.modules.get(f"{part} pooled") for part in block.parts}
    telling = [part for part in pooled if pooled[part]]
    if not telling:
        return family.subsample
    subsampled = [part for part in telling if pooled[part] == block.parts[part]]
    if not subsampled:
        return ("none",)
    if subsampled != telling:
        raise ConversionError(f"of phi and g only {', '.join(subsampled)} is subsampled")
    return ("embeddings",)


def _norm_of(block: Block, family: Family, options: Options) -> str:
    legal: tuple[str, ...] = ("GN", "LN")
    if block.is_context:
        return "LN"
    if "norm" not in block.parts:
        legal = ("",)
    elif "norm.running_var" in block.tensors:
        legal = BATCH_NORMS
    elif family.affine:
        legal = ("FrozenBN",)
    elif options.norm is None:
        raise ConversionError(
            "its norm has no running statistics, and the file does not say what it is: say "
            "norm='GN' if it is group norm with 32 groups, norm='LN' if it is layer norm over "
            "the channels of each position; another one cannot be converted"
        )
    if options.norm is None:
        return legal[0]
    check_choice("norm", options.norm, legal)
    return options.norm


def _drop_counter(block: Block) -> None:
    counter = "norm.num_batches_tracked"
    if block.traits.norm == "FrozenBN" and block.tensors.pop(counter, None) is not None:
        block.notes[counter] = "a counter that a frozen batch norm does not have"


def _add_biases(block: Block, convs: Sequence[str], family: Family) -> None:
    """Zeros where the family may lack a bias."""
    for part in convs:
        if f"{part}.weight" not in block.tensors:
            raise ConversionError(f"{part} has no weight: it is incomplete")
        if part == "concat" or f"{part}.bias" in block.tensors:
            continue
        if part not in family.no_bias:
            raise ConversionError(f"{part} has no bias: it is incomplete")
        weight = block.tensors[f"{part}.weight"]
        note = f"zeros, as the {part} of {family.title} has no bias here"
        block.change(f"{part}.bias", weight.new_zeros(weight.shape[0]), note)


def _reshape_convs(block: Block, convs: Sequence[str], dims: int | None) -> None:
    """Kernels of size 1 in ``dims`` dimensions (None: those of the file)."""
    first = block.embedding
    if block.dims < 1:
        shape = tuple(block.tensors[f"{first}.weight"].shape)
        raise ConversionError(f"{first} has shape {shape}, which is no convolution's")
    inner, channels = block.inner_channels, block.in_channels
    sizes = {"1": 1, "C": channels, "d": inner, "D": 2 * inner}
    dims = dims or block.dims
    for part in convs:
        name = f"{part}.weight"
        weight, shape = block.tensors[name], tuple(sizes[letter] for letter in _CONVS[part])
        if tuple(weight.shape) != shape + (1,) * (weight.dim() - 2):
            raise ConversionError(
                f"{part} has shape {tuple(weight.shape)}, but must be a 1x1 convolution of shape "
                f"{shape}: {first} has {channels} channels in and {inner} out"
            )
        block.tensors[name] = weight.reshape(shape + (1,) * dims)
        if weight.dim() != dims + 2:
            block.notes[name] = f"{weight.dim()}-D weight (kernel 1) as {dims + 2}-D"


def _check_norm(block: Block) -> None:
    norm = {n: t for n, t in block.tensors.items() if n.startswith("norm.") and t.dim()}
    channels = block.inner_channels if block.is_context else block.in_channels
    for name, tensor in norm.items():
        if tuple(tensor.shape) != (channels,):
            raise ConversionError(
                f"{name} has shape {tuple(tensor.shape)}, but must have ({channels},)"
            )
    needed = {"norm.weight", "norm.bias"} if block.traits.norm else set()
    if block.traits.norm in BATCH_NORMS and not _is_affine(block):
        needed |= {"norm.running_mean", "norm.running_var"}
    missing = needed - set(norm)
    if missing:
        raise ConversionError(f"it has no {', '.join(sorted(missing))}: it is incomplete")


def _is_affine(block: Block) -> bool:
    return block.traits.norm == "FrozenBN" and "norm.running_var" not in block.tensors


def _carry_norm(block: Block, eps: float) -> None:
    if block.traits.norm not in BATCH_NORMS:
        return
    if _is_affine(block):
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
