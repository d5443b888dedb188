"""GCNet's ``context_block.py``, which is mmcv's and mmdetection's, too."""

from __future__ import annotations

from nl_detectron.weights.block import Block
from nl_detectron.weights.family import Family


def _adapt(block: Block) -> None:
    for leaf in ("weight", "bias"):
        name = f"norm.{leaf}"
        if name in block.tensors:  # if not, that is said later
            block.change(name, block.tensors[name].flatten(), "its two dimensions of 1 left out")
    if "context" not in block.parts:
        weight = block.tensors["reduce.weight"]
        note = "zeros: it averages (pooling_type 'avg'), as a softmax of zeros does"
        block.change("context.weight", weight.new_zeros(1, *weight.shape[1:]), note)
        block.change("context.bias", weight.new_zeros(1), note)


FAMILY = Family(
    title="GCNet",
    modules={
        "context": "conv_mask",
        "reduce": "channel_add_conv.0",
        "norm": "channel_add_conv.1",
        "out": "channel_add_conv.3",
        # It multiplies x by a second transform, and the rest of it is no part of a block of ours.
        "factor": "channel_mul_conv.3",
    },
    scales={"global_context": ()},
    needs=(frozenset({"reduce", "out"}), frozenset({"factor"})),
    adapt=_adapt,
)
