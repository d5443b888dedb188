"""
mmcv 2.2's ``non_local.py``, which mmdetection uses, and mmsegmentation 1.2's disentangled block,
which is derived from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nl_detectron.weights.block import BATCH_NORMS, Block, common_reduction
from nl_detectron.weights.family import EITHER, NO_SOFTMAX, Family, Target
from nl_detectron.weights.report import ConversionError

_NORMS = {"": None, "GN": {"type": "GN", "num_groups": 32}}


def _settings(blocks: Mapping[str, Block], notes: list[str]) -> dict[str, Any]:
    """The arguments of NonLocal1d, 2d or 3d, by block."""
    return {
        name: {
            "type": f"NonLocal{block.dims}d",
            "in_channels": block.in_channels,
            "reduction": common_reduction([block]),
            "use_scale": block.traits.scale,
            "mode": block.traits.pairwise,
            "sub_sample": block.traits.subsample == "embeddings",
            "norm_cfg": _NORMS.get(block.traits.norm, {"type": "BN"}),
        }
        for name, block in blocks.items()
    }


def _adapt(block: Block) -> None:
    """Its w_f is a 2-D convolution in the 1-D and 3-D blocks too."""
    if block.traits.pairwise == "disentangled":
        raise ConversionError(
            f"{block.prefix or 'the block'}: mmcv has no pairwise='disentangled', only "
            "mmsegmentation has, which blocks are not written for"
        )
    if "concat.weight" in block.tensors:
        weight = block.tensors["concat.weight"]
        block.tensors["concat.weight"] = weight.reshape(1, -1, 1, 1)


FAMILY = Family(
    title="mmcv",
    modules={
        "theta": "theta.conv",
        "phi": "phi.conv",
        "phi pooled": "phi.0.conv",
        "g": "g.conv",
        "g pooled": "g.0.conv",
        "out": "conv_out.conv",
        "norm": "conv_out.bn",
        "norm GN": "conv_out.gn",
        "concat": "concat_project.conv",
        "unary": "conv_mask",
    },
    scales={
        "gaussian": (False,),
        "embedded_gaussian": EITHER,
        "disentangled": EITHER,
        **NO_SOFTMAX,
    },
    subsample=("none", "embeddings"),
    no_bias=("out",),
    usual={"pairwise": "embedded_gaussian", "scale": True},
    target=Target(
        dims=(None, 1, 2, 3),
        norms=("", *BATCH_NORMS, "GN"),
        settings=_settings,
        adapt=_adapt,
    ),
)
