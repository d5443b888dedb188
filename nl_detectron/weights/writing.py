"""Blocks in our terms into those of another implementation."""

from __future__ import annotations

from dataclasses import replace

from nl_detectron.weights.block import BATCH_NORMS, Block
from nl_detectron.weights.conversion import ConversionError
from nl_detectron.weights.family import Family


def write_block(block: Block, family: Family) -> tuple[Block, dict[str, str]]:
    """
    The block, changed so that ``family`` computes the same with it, and the names of its tensors
    there by the names here; a ConversionError says why it cannot.
    """
    where = f"{block.title}: {family.title} has no"
    legal = {"pairwise": family.scales, "subsample": family.subsample, "norm": family.norms}
    for key, values in legal.items():
        value = getattr(block.traits, key)
        if value not in values:
            raise ConversionError(f"{where} {key}={value!r}, only {', '.join(map(repr, values))}")
    block = replace(block, tensors=dict(block.tensors), notes=dict(block.notes))
    scales = family.scales[block.traits.pairwise]
    if scales and block.traits.scale not in scales:
        _rescale(block, where)
    if block.traits.norm and "out" in family.no_bias:
        _fold_bias(block, where)
    family.to_theirs(block)
    names = {}
    for name in block.tensors:
        part, leaf = name.split(".")
        names[name] = f"{family.parts[part].name_in(block.traits)}.{leaf}"
    return block, names


def _rescale(block: Block, where: str) -> None:
    """Turn the block's scale around, by changing theta by the factor that the logits lose."""
    scale = not block.traits.scale
    if "theta.weight" not in block.tensors:
        raise ConversionError(
            f"{where} {block.traits.pairwise} with scale={not scale}, and without theta there is "
            "nothing to carry the scale over to"
        )
    factor = block.inner_channels ** (0.5 if scale else -0.5)
    block.multiply_theta(factor, f"times {factor:.6g}, for scale={scale}")
    block.traits = block.traits._replace(scale=scale)


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
