"""What to set in a config for the non-local blocks that a state dict holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]

_TENSOR = re.compile(
    r"(?:(?P<parent>.+)\.)?nonlocal(?P<index>\d+|(?<=\.nonlocal))\.(?:refine\.)?(?P<tensor>.+)"
)
_KEYPOINT_HEAD = "keypoint_head"
_BACKBONE = "backbone."


def block_of(tensor: str) -> str | None:
    """The name of the inserted block that a tensor of a state dict belongs to; None for none."""
    match = _TENSOR.fullmatch(tensor)
    return tensor[: match.start("tensor") - 1] if match else None


def block_settings(shapes: Shapes, stages: Sequence[str]) -> dict[str, str]:
    """The config keys that the tensors of blocks determine, with values as a command line takes
    them: from the names and shapes of a model or a checkpoint, and the backbone's stages, in
    order."""
    matches = [match for match in map(_TENSOR.fullmatch, shapes) if match]
    places: dict[str, set[int]] = {}
    modules: dict[str, None] = {}
    settings = {}
    for match in matches:
        parent = match["parent"] or ""
        if match["index"]:
            places.setdefault(parent.rpartition(".")[2], set()).add(int(match["index"]))
        elif f"{parent}." == _BACKBONE:
            settings["MODEL.BACKBONE.NAME"] = "build_balanced_fpn_backbone"
        elif parent.startswith(_BACKBONE):
            modules[parent.removeprefix(_BACKBONE)] = None
    head = places.pop(_KEYPOINT_HEAD, set())
    if modules:
        settings["MODEL.BACKBONE.NAME"] = "build_nonlocal_backbone"
        settings["MODEL.NONLOCAL.AFTER_MODULES"] = f'"{list(modules)}"'
    if places:
        settings["MODEL.BACKBONE.NAME"] = "build_nonlocal_backbone"
    if places and set(places) <= set(stages):
        per_stage = [sorted(places.get(stage, ())) for stage in stages]
        settings["MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE"] = f'"{per_stage}"'
    if head:
        settings["MODEL.ROI_KEYPOINT_HEAD.NAME"] = "NonLocalKeypointHead"
        settings["MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY"] = str(min(head))
    if matches:
        settings.update(_options(shapes, block_of(matches[0].string)))
    return settings


def _options(shapes: Shapes, block: str | None) -> dict[str, str]:
    """The options of one block; all blocks of a config have the same."""
    own = {
        name[len(f"{block}.") :]: shape for name, shape in shapes.items() if block_of(name) == block
    }
    if "context.weight" in own:
        reduced, channels = own["reduce.weight"][:2]
        return {
            "MODEL.NONLOCAL.BLOCK": "GlobalContextBlock",
            "MODEL.NONLOCAL.REDUCTION": str(channels // reduced),
        }
    norm = {"MODEL.NONLOCAL.NORM": _norm(own)}
    if "g.weight" in own:
        inner_channels, channels = own["g.weight"][:2]
        reduction = {"MODEL.NONLOCAL.REDUCTION": str(channels // inner_channels)}
        return {"MODEL.NONLOCAL.PAIRWISE": _pairwise(own), **norm, **reduction}
    if "gamma" in own:
        return {"MODEL.NONLOCAL.BLOCK": "TimmAttention"}
    kind = "LocalBlock" if "conv3.weight" in own else f"(one that has {', '.join(own)})"
    return {"MODEL.NONLOCAL.BLOCK": kind, **norm}


def _pairwise(own: Shapes) -> str:
    if "concat.weight" in own:
        return "concatenation"
    if "unary.weight" in own:
        return "disentangled"
    # These two have the same tensors.
    return "embedded_gaussian (or dot_product)" if "theta.weight" in own else "gaussian"


def _norm(own: Shapes) -> str:
    if "norm.running_mean" in own:
        return "BN (or SyncBN, FrozenBN)"
    return "GN (or LN)" if "norm.weight" in own else '""'
