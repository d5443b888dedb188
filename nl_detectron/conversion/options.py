"""What whoever converts may say about the weights, and how an unsaid thing is settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nl_detectron.conversion.families import BATCH_NORMS, Family
from nl_detectron.conversion.report import ConversionError
from nl_detectron.validation import check_choice


@dataclass(frozen=True)
class Options:
    """None is "not said"; see :func:`nl_detectron.conversion.convert` for the meanings."""

    pairwise: str | None = None
    scale: bool | None = None
    subsample: str | None = None
    norm: str | None = None
    norm_eps: float | None = None
    dims: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Traits:
    """What a block computes, in the words of :class:`NonLocalBlock`'s arguments."""

    pairwise: str
    scale: bool
    subsample: str
    norm: str


def settle_traits(
    family: Family,
    options: Options,
    parts: Mapping[str, str],
    norm_leaves: Sequence[str],
    notes: list[str],
) -> Traits:
    """
    Args:
        family: whose block it is.
        options: what was said about it.
        parts: the block's parts, our names to the family's.
        norm_leaves: the parameters and buffers that its norm has.
        notes: gets one for each thing that was assumed.

    Raises:
        ConversionError: something has to be said, or the block is none that the family has.
        ValueError: what was said contradicts the names.
    """
    open_questions: dict[str, Sequence[Any]] = {}

    def settle(key: str, legal: Sequence[Any]) -> Any:
        said = getattr(options, key)
        if said is not None:
            check_choice(key, said, legal)
            return said
        if len(legal) == 1:
            return legal[0]
        if family.assume_usual:
            others = " or ".join(repr(value) for value in legal if value != family.usual[key])
            note = (
                f"The file does not say {key}; assumed is {family.usual[key]!r}, as {family.title} "
                f"has it unless told otherwise. If this was told otherwise: {key}={others}."
            )
            if note not in notes:
                notes.append(note)
            return family.usual[key]
        open_questions[key] = legal
        return None

    pairwise = settle("pairwise", _pairwise_of(family, parts))
    # Where there is no softmax there is no scale; True is the config's default.
    scale = True
    if pairwise is None or "gaussian" in pairwise:
        scale = settle("scale", family.scale[pairwise or "embedded_gaussian"])
    traits = (pairwise, scale, settle("subsample", _subsample_of(family, parts)))
    norm = _norm_of(family, options, norm_leaves)
    if open_questions:
        raise ConversionError(_please_say(family, open_questions))
    return Traits(*traits, norm)


def _pairwise_of(family: Family, parts: Mapping[str, str]) -> Sequence[str]:
    if "concat" in parts:
        kinds: tuple[str, ...] = ("concatenation",)
    elif "theta" in parts:
        kinds = ("embedded_gaussian", "dot_product")
    else:
        kinds = ("gaussian",)
    had = [kind for kind in kinds if kind in family.pairwise]
    if not had:
        raise ConversionError(
            f"with the parts {', '.join(sorted(parts))} it would be a {kinds[0]} block, which "
            f"{family.title} does not have: it is incomplete"
        )
    return had


def _subsample_of(family: Family, parts: Mapping[str, str]) -> Sequence[str]:
    if not family.pooled:
        return family.subsample
    pooled = {part for part, name in parts.items() if family.pooled.get(part) == name}
    if not pooled:
        return ("none",)
    if pooled != set(family.pooled) & set(parts):
        raise ConversionError(f"of phi and g only {', '.join(pooled)} is subsampled")
    return ("embeddings",)


def _norm_of(family: Family, options: Options, leaves: Sequence[str]) -> str:
    if not leaves:
        legal: tuple[str, ...] = ("",)
    elif "running_var" in leaves:
        legal = BATCH_NORMS
    elif family.affine:
        legal = ("FrozenBN",)
    else:
        legal = ("GN", "LN")
        if options.norm is None:
            raise ConversionError(
                "its norm has no running statistics, and the file does not say what it is: say "
                "norm='GN' if it is group norm with 32 groups, norm='LN' if it is layer norm over "
                "the channels of each position; another one cannot be converted"
            )
    if options.norm is not None:
        check_choice("norm", options.norm, legal)
        return options.norm
    return legal[0]


def _please_say(family: Family, questions: Mapping[str, Sequence[Any]]) -> str:
    lines = []
    for key, legal in questions.items():
        usual = f" ({family.title}'s default: {family.usual[key]!r})" if key in family.usual else ""
        lines.append(f"{key}={' or '.join(map(repr, legal))}{usual}")
    flags = ", ".join(f"--{key}" for key in questions)
    return (
        f"the file does not tell {'; '.join(lines)}. Say how the model was built "
        f"(convert_weights.py: {flags})"
    )
