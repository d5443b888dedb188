"""The settings under which converted blocks compute what they did."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from nl_detectron.conversion.nonlocal_blocks import Block
from nl_detectron.conversion.report import ConversionError

_OUR_PLACE = re.compile(r"(?:.*\.)?res([2-5])\.nonlocal(\d+)")


def nonlocal_config(blocks: Mapping[str, Block], notes: list[str]) -> dict[str, Any]:
    """
    The node MODEL for a model with these blocks, by their names in it. ``notes`` gets one if that
    is not all: if the place of a block is not known.

    Raises:
        ConversionError: the blocks differ in what they compute: one MODEL.NONLOCAL is not enough.
    """
    names, traits = list(blocks), [block.traits for block in blocks.values()]
    for name, other in zip(names, traits):
        if other != traits[0]:
            raise ConversionError(
                f"{names[0]} and {name} differ, and MODEL.NONLOCAL holds for all: "
                f"{traits[0]} and {other}"
            )
    nonlocal_node: dict[str, Any] = {
        "PAIRWISE": traits[0].pairwise,
        "REDUCTION": common_reduction(blocks.values()),
        "SCALE": traits[0].scale,
        "SUBSAMPLE": traits[0].subsample,
        "NORM": traits[0].norm,
    }
    places = [_OUR_PLACE.fullmatch(name) for name in names]
    if not all(places):
        lost = ", ".join(repr(name) for name, where in zip(names, places) if not where)
        notes.append(
            f"The place of {lost} in our model is not known, so AFTER_BLOCKS_PER_STAGE is left to "
            "you. rename (convert_weights.py: --rename OLD=NEW) puts a block in its place: "
            "NEW is res4.nonlocal4 for one after residual block 4 of res4."
        )
        return {"NONLOCAL": nonlocal_node}
    after: list[list[int]] = [[], [], [], []]
    for match in filter(None, places):
        after[int(match[1]) - 2].append(int(match[2]))
    nonlocal_node["AFTER_BLOCKS_PER_STAGE"] = [sorted(indices) for indices in after]
    return {"BACKBONE": {"NAME": "build_nonlocal_backbone"}, "NONLOCAL": nonlocal_node}


def block_arguments(block: Block, to: str) -> dict[str, Any]:
    """What to build the block with: mmcv's NonLocal1d, 2d, 3d or PyTorchVideo's create_nonlocal."""
    traits = block.traits
    if to == "mmcv":
        norm = {"": None, "GN": {"type": "GN", "num_groups": 32}}.get(traits.norm, {"type": "BN"})
        return {
            "type": f"NonLocal{block.dims}d",
            "in_channels": block.in_channels,
            "reduction": common_reduction([block]),
            "use_scale": traits.scale,
            "mode": traits.pairwise,
            "sub_sample": traits.subsample == "embeddings",
            "norm_cfg": norm,
        }
    return {
        "dim_in": block.in_channels,
        "dim_inner": block.inner_channels,
        "pool_size": [1, 2, 2] if traits.subsample == "input" else None,
        "instantiation": "dot_product" if traits.pairwise == "dot_product" else "softmax",
        # Their default is batch norm, and None is no norm.
        **({} if traits.norm else {"norm": None}),
    }


def common_reduction(blocks: Iterable[Block]) -> int:
    """
    The ``reduction`` that gives all of these blocks the inner width they have: C // reduction = d.

    Raises:
        ConversionError: no integer does.
    """
    low, high, widths = 1, 2**31, []
    for block in blocks:
        channels, inner = block.in_channels, block.inner_channels
        low, high = max(low, channels // (inner + 1) + 1), min(high, channels // inner)
        widths.append(f"{inner} of {channels}")
    if low > high:
        raise ConversionError(
            "no integer reduction gives the inner channels that the blocks have: "
            + ", ".join(dict.fromkeys(widths))
        )
    return high
