"""Blocks in our terms into those of another implementation."""

from __future__ import annotations

from dataclasses import replace

from nl_detectron.weights.block import BATCH_NORMS, Block
from nl_detectron.weights.family import Family, Target
from nl_detectron.weights.report import ConversionError


def write_block(block: Block, family: Family, target: Target) -> tuple[Block, dict[str, str]]:
    """
    Args:
        block: in our terms; not changed.
        family: the implementation to write it for.
        target: how.

    Returns:
        The block, changed so that ``family`` computes the same with it, and the names of its
        tensors there by the names here.

    Raises:
        ConversionError: ``family`` cannot compute the same.
    """
    where = f"{block.prefix or 'the block'}: {family.title} has no"
    legal = {"pairwise": family.scales, "subsample": family.subsample, "norm": target.norms}
    for key, values in legal.items():
        value = getattr(block.traits, key)
        if value not in values:
            raise ConversionError(f"{where} {key}={value!r}, only {', '.join(map(repr, values))}")
    block = replace(block, tensors=dict(block.tensors), notes=dict(block.notes))
    scales = family.scales[block.traits.pairwise]
    if scales and block.traits.scale not in scales:
        _rescale(block, not block.traits.scale, where)
    if block.traits.norm and "out" in family.no_bias:
        _fold_bias(block, where)
    target.adapt(block)
    return block, {name: _their_name(name, block, family) for name in block.tensors}


def _their_name(name: str, block: Block, family: Family) -> str:
    part, leaf = name.split(".")
    words = (block.traits.norm, "pooled" if block.traits.subsample == "embeddings" else "")
    variants = [f"{part} {word}" for word in words if f"{part} {word}" in family.modules]
    return f"{family.modules[variants[0] if variants else part]}.{leaf}"


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
