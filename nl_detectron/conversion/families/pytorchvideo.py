"""PyTorchVideo 0.1.5's ``nonlocal_net.py``."""

from __future__ import annotations

from typing import Any

from nl_detectron.conversion.block import BATCH_NORMS, Block
from nl_detectron.conversion.families.slowfast import CONVS, SCALES, is_slowfast
from nl_detectron.conversion.family import Family, Target, per_block


def _arguments(block: Block) -> dict[str, Any]:
    """Those of ``create_nonlocal``."""
    traits = block.traits
    return {
        "dim_in": block.in_channels,
        "dim_inner": block.inner_channels,
        "pool_size": [1, 2, 2] if traits.subsample == "input" else None,
        "instantiation": "dot_product" if traits.pairwise == "dot_product" else "softmax",
        # Their default is batch norm, and None is no norm.
        **({} if traits.norm else {"norm": None}),
    }


FAMILY = Family(
    title="PyTorchVideo",
    modules={**CONVS, "norm": "norm"},
    scales=SCALES,
    subsample=("input", "none"),
    recognises=lambda names: not is_slowfast(names),
    usual={"pairwise": "embedded_gaussian", "subsample": "none"},
    target=Target(dims=(3,), norms=("", *BATCH_NORMS), settings=per_block(_arguments)),
)
