"""DNL-Object-Detection's ``nl_gc_block.py``."""

from __future__ import annotations

from nl_detectron.weights.family import Family

FAMILY = Family(
    title="DNL",
    modules={
        "theta": "conv_query",
        "phi": "conv_key",
        "g": "conv_value",
        "unary": "conv_mask",
        "out": "conv_out",
    },
    scales={},
    needs=(frozenset({"theta", "phi", "g"}),),
    refusal=(
        "DNL's own gamma multiplies the pairs' term only, not the unary one, and our block has one "
        "W_z for the sum of both, so that it cannot compute the same (mmsegmentation's DNL can be "
        "converted)"
    ),
)
