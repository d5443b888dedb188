"""This package's own blocks, and the node MODEL of a config for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nl_detectron.weights.block import BATCH_NORMS, Block, Traits, common_reduction
from nl_detectron.weights.family import EITHER, NO_SOFTMAX, Family, Target
from nl_detectron.weights.report import ConversionError

_PLACE = re.compile(r"(?:.*\.)?res([2-5])\.nonlocal(\d+)")


def _settings(blocks: Mapping[str, Block], notes: list[str]) -> dict[str, Any]:
    """One MODEL.NONLOCAL for all; without the places if the place of a block is not known."""
    names, traits = list(blocks), [block.traits for block in blocks.values()]
    for name, other in zip(names, traits):
        if other != traits[0]:
            raise ConversionError(
                f"{names[0]} and {name} differ, and MODEL.NONLOCAL holds for all: "
                f"{traits[0]} and {other}"
            )
    node = _options(traits[0], common_reduction(blocks.values()))
    lost = [name for name in names if not _PLACE.fullmatch(name)]
    if lost:
        notes.append(
            f"The place of {', '.join(map(repr, lost))} in our model is not known, so "
            "AFTER_BLOCKS_PER_STAGE is left to you. rename (convert_weights.py: --rename OLD=NEW) "
            "puts a block in its place: NEW is res4.nonlocal4 for one after residual block 4 of "
            "res4."
        )
        return {"MODEL": {"NONLOCAL": node}}
    places = sorted(_PLACE.sub(r"\1 \2", name).split() for name in names)
    node["AFTER_BLOCKS_PER_STAGE"] = [
        sorted(int(after) for at, after in places if at == stage) for stage in "2345"
    ]
    return {"MODEL": {"BACKBONE": {"NAME": "build_nonlocal_backbone"}, "NONLOCAL": node}}


def _options(traits: Traits, reduction: int) -> dict[str, Any]:
    if traits.pairwise == "global_context":
        return {"BLOCK": "GlobalContextBlock", "REDUCTION": reduction}
    node: dict[str, Any] = {
        "PAIRWISE": traits.pairwise,
        "REDUCTION": reduction,
        "SCALE": traits.scale,
        "SUBSAMPLE": traits.subsample,
        "NORM": traits.norm,
    }
    if traits.pairwise == "disentangled":
        node["TEMPERATURE"] = traits.temperature
    return node


_SOFTMAX = ("gaussian", "embedded_gaussian", "disentangled")
_PARTS = ("theta", "phi", "g", "out", "norm", "concat", "unary", "context", "reduce")

FAMILY = Family(
    title="nl_detectron",
    modules={name: name for name in _PARTS},
    scales={**dict.fromkeys(_SOFTMAX, EITHER), **NO_SOFTMAX, "global_context": ()},
    needs=(frozenset({"g", "out"}), frozenset({"context", "reduce", "out"})),
    usual={"pairwise": "embedded_gaussian", "scale": True, "subsample": "embeddings"},
    target=Target(dims=(2, 1, 3), norms=("", *BATCH_NORMS, "GN", "LN"), settings=_settings),
)
