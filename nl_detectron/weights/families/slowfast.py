"""
SlowFast's ``nonlocal_helper.py`` and PyTorchVideo 0.1.5's ``nonlocal_net.py``: the same block; only
the names of the norm and of the block differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nl_detectron.weights.block import BATCH_NORMS, Block
from nl_detectron.weights.family import Family, Target

_CONVS = {"theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "out": "conv_out"}
_SCALES = {"embedded_gaussian": (True,), "dot_product": ()}


def _is_slowfast(names: Sequence[str]) -> bool:
    return any(re.search(r"(^|\.)pathway\d+_nonlocal\d+\.|(^|\.)bn\.", name) for name in names)


def _settings(blocks: Mapping[str, Block], notes: list[str]) -> dict[str, Any]:
    """The arguments of ``create_nonlocal``, by block."""
    return {
        name: {
            "dim_in": block.in_channels,
            "dim_inner": block.inner_channels,
            "pool_size": [1, 2, 2] if block.traits.subsample == "input" else None,
            "instantiation": {"dot_product": "dot_product"}.get(block.traits.pairwise, "softmax"),
            # Their default is batch norm, and None is no norm.
            **({} if block.traits.norm else {"norm": None}),
        }
        for name, block in blocks.items()
    }


SLOWFAST = Family(
    title="SlowFast",
    modules={**_CONVS, "norm": "bn", "norm renamed": "norm"},
    scales=_SCALES,
    subsample=("input", "none"),
    place_names=(r"(?:.*\.)?s(\d)\.pathway0_nonlocal(\d+)", r"res\1.nonlocal\2"),
    recognises=_is_slowfast,
    usual={"pairwise": "dot_product", "subsample": "input"},
)
PYTORCHVIDEO = Family(
    title="PyTorchVideo",
    modules={**_CONVS, "norm": "norm"},
    scales=_SCALES,
    subsample=("input", "none"),
    recognises=lambda names: not _is_slowfast(names),
    usual={"pairwise": "embedded_gaussian", "subsample": "none"},
    target=Target(dims=(3,), norms=("", *BATCH_NORMS), settings=_settings),
)
