"""timm 1.0's ``non_local_attn.py``."""

from __future__ import annotations

from nl_detectron.weights.block import Block
from nl_detectron.weights.family import EITHER, Family


def _scale_by_inner_channels(block: Block) -> None:
    if block.traits.scale:
        factor = (block.inner_channels / block.in_channels) ** 0.5
        note = f"times (d/C)^1/2 = {factor:.6g}: timm scales by C^-1/2, we by d^-1/2"
        for name in ("theta.weight", "theta.bias"):
            block.change(name, block.tensors[name] * factor, note)


FAMILY = Family(
    title="timm",
    modules={"theta": "t", "phi": "p", "g": "g", "out": "z", "norm": "norm"},
    scales={"embedded_gaussian": EITHER},
    subsample=("none",),
    usual={"scale": True},
    assume_usual=True,
    adapt=_scale_by_inner_channels,
)
