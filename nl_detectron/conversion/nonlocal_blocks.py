"""Non-local blocks: from any implementation's names into ours, and from ours into others'."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nl_detectron.conversion.families import BATCH_NORMS, Family
from nl_detectron.conversion.finding import FoundBlock
from nl_detectron.conversion.options import Options, Traits, settle_traits
from nl_detectron.conversion.report import ConversionError

# Of the batch norms that get_norm makes.
OUR_EPS = 1e-5


@dataclass
class Block:
    """
    A block in our terms. ``tensors`` has the names of a :class:`NonLocalBlock`'s state dict;
    ``origins`` says which tensor of the file each was, and ``notes`` how it was changed, or why it
    is in ``origins`` only.
    """

    prefix: str
    traits: Traits
    in_channels: int
    inner_channels: int
    dims: int
    tensors: dict[str, Tensor]
    origins: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)

    def change(self, name: str, tensor: Tensor, note: str) -> None:
        self.tensors[name] = tensor
        self.notes[name] = "; ".join(filter(None, (self.notes.get(name), note)))


def read_block(found: FoundBlock, family: Family, options: Options, notes: list[str]) -> Block:
    """
    A block of ``family`` in our terms, changed so that it computes the same.

    Raises:
        ConversionError: it is incomplete, or ours cannot compute the same.
    """
    try:
        if found.faults:
            raise ConversionError(found.faults[0])
        traits = settle_traits(family, options, found.parts, found.leaves("norm"), notes)
        block = _in_our_names(found, family, traits, options.dims)
        _carry_scale(block, family)
        _carry_norm(block, family.norm_eps if options.norm_eps is None else options.norm_eps)
        return block
    except ConversionError as error:
        raise ConversionError(f"{found.prefix or 'the block'}: {error}") from error


def write_block(block: Block, family: Family) -> tuple[Block, dict[str, str]]:
    """
    A block as ``family`` has it.

    Returns:
        The block, changed so that ``family`` computes the same with it, and the names of its
        tensors there by the names here.

    Raises:
        ConversionError: ``family`` cannot compute the same.
    """
    traits, where = block.traits, f"{block.prefix or 'the block'}: {family.title} has no"
    for key, legal in (
        ("pairwise", family.pairwise),
        ("subsample", family.subsample),
        ("norm", family.norms),
    ):
        if getattr(traits, key) not in legal:
            raise ConversionError(
                f"{where} {key}={getattr(traits, key)!r}, only {', '.join(map(repr, legal))}"
            )
    block = replace(block, tensors=dict(block.tensors), notes=dict(block.notes))
    if "gaussian" in traits.pairwise and traits.scale not in family.scale[traits.pairwise]:
        _rescale(block, not traits.scale, where)
    if traits.norm and "out" in family.no_bias:
        _fold_bias(block, where)
    theirs = {**family.modules, **(family.pooled if traits.subsample == "embeddings" else {})}
    theirs["norm"] = family.norm_aliases.get(traits.norm, family.modules["norm"])
    if family.concat_dims and "concat.weight" in block.tensors:
        weight = block.tensors["concat.weight"]
        block.tensors["concat.weight"] = weight.reshape(1, -1, *(1,) * family.concat_dims)
    names = {}
    for name in block.tensors:
        part, leaf = name.split(".")
        names[name] = f"{theirs[part]}.{leaf}"
    return block, names


def _in_our_names(found: FoundBlock, family: Family, traits: Traits, dims: int | None) -> Block:
    tensors: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    notes: dict[str, str] = {}
    for (part, leaf), (name, tensor) in found.tensors.items():
        origins[f"{part}.{leaf}"] = name
        if (leaf, traits.norm) == ("num_batches_tracked", "FrozenBN"):
            notes["norm.num_batches_tracked"] = "a counter that a frozen batch norm does not have"
        else:
            tensors[f"{part}.{leaf}"] = tensor
    convs = [part for part in ("theta", "phi", "g", "concat", "out") if part in found.parts]
    for part in convs:
        if f"{part}.weight" not in tensors:
            raise ConversionError(f"{part} has no weight: it is incomplete")
        if part != "concat" and f"{part}.bias" not in tensors:
            if part not in family.no_bias:
                raise ConversionError(f"{part} has no bias: it is incomplete")
            weight = tensors[f"{part}.weight"]
            tensors[f"{part}.bias"] = weight.new_zeros(weight.shape[0])
            notes[f"{part}.bias"] = f"zeros, as the {part} of {family.title} has no bias here"
    g = tensors["g.weight"]
    if g.dim() < 3:
        raise ConversionError(f"g has shape {tuple(g.shape)}, which is no convolution's")
    inner, channels = g.shape[:2]
    dims = dims or g.dim() - 2
    shapes = {
        "theta": (inner, channels),
        "phi": (inner, channels),
        "g": (inner, channels),
        "concat": (1, 2 * inner),
        "out": (channels, inner),
    }
    for part in convs:
        name = f"{part}.weight"
        weight = tensors[name]
        if tuple(weight.shape) != shapes[part] + (1,) * (weight.dim() - 2):
            raise ConversionError(
                f"{part} has shape {tuple(weight.shape)}, but must be a 1x1 convolution of shape "
                f"{shapes[part]}: g has {channels} channels in and {inner} out"
            )
        tensors[name] = weight.reshape(shapes[part] + (1,) * dims)
        if weight.dim() != dims + 2:
            notes[name] = f"{weight.dim()}-D weight (kernel 1) as {dims + 2}-D"
    block = Block(found.prefix, traits, channels, inner, dims, tensors, origins, notes)
    _check_norm(block)
    return block


def _check_norm(block: Block) -> None:
    norm = {n: t for n, t in block.tensors.items() if n.startswith("norm.") and t.dim()}
    for name, tensor in norm.items():
        if tuple(tensor.shape) != (block.in_channels,):
            raise ConversionError(
                f"{name} has shape {tuple(tensor.shape)}, but must have ({block.in_channels},)"
            )
    needed = {"": set(), "GN": {"weight", "bias"}, "LN": {"weight", "bias"}}.get(
        block.traits.norm, {"weight", "bias", "running_mean", "running_var"}
    )
    if block.traits.norm == "FrozenBN" and "norm.running_var" not in norm:
        needed = {"weight", "bias"}
    missing = {f"norm.{leaf}" for leaf in needed} - set(norm)
    if missing:
        raise ConversionError(f"it has no {', '.join(sorted(missing))}: it is incomplete")


def _carry_scale(block: Block, family: Family) -> None:
    if family.scale_by_input and block.traits.scale:
        factor = (block.inner_channels / block.in_channels) ** 0.5
        for name in ("theta.weight", "theta.bias"):
            block.change(
                name,
                block.tensors[name] * factor,
                f"times (d/C)^1/2 = {factor:.6g}: {family.title} scales by C^-1/2, we by d^-1/2",
            )


def _carry_norm(block: Block, eps: float) -> None:
    if block.traits.norm not in BATCH_NORMS:
        return
    if "norm.running_var" not in block.tensors:
        like = block.tensors["norm.weight"]
        note = "no statistics in the file: multiplication and addition only"
        block.change("norm.running_mean", torch.zeros_like(like), note)
        block.change("norm.running_var", torch.full_like(like, 1 - OUR_EPS), note)
    elif eps != OUR_EPS:
        variance = block.tensors["norm.running_var"] + (eps - OUR_EPS)
        if (variance < 0).any():
            raise ConversionError(
                f"eps {eps} of its batch norm cannot be carried over to {OUR_EPS}: a variance "
                "would be negative"
            )
        block.change(
            "norm.running_var", variance, f"plus {eps - OUR_EPS:.3g}: eps is {eps:.8g} there"
        )


def _rescale(block: Block, scale: bool, where: str) -> None:
    """Let ``scale`` be the block's, by changing theta by the factor that the logits lose."""
    if "theta.weight" not in block.tensors:
        raise ConversionError(
            f"{where} {block.traits.pairwise} with scale={not scale}, and without theta there is "
            "nothing to carry the scale over to"
        )
    factor = block.inner_channels ** (0.5 if scale else -0.5)
    for name in ("theta.weight", "theta.bias"):
        block.change(name, block.tensors[name] * factor, f"times {factor:.6g}, for scale={scale}")
    block.traits = replace(block.traits, scale=scale)


def _fold_bias(block: Block, where: str) -> None:
    """Take the bias of ``out`` away: a batch norm subtracts it with the mean."""
    bias = block.tensors.pop("out.bias")
    block.notes["out.bias"] = "there it has none with a norm; this one is in the norm's mean"
    if not bias.any():
        return
    if block.traits.norm not in BATCH_NORMS:
        raise ConversionError(f"{where} bias between W_z and {block.traits.norm}")
    mean = block.tensors["norm.running_mean"]
    block.change("norm.running_mean", mean - bias, "minus the bias of out")
