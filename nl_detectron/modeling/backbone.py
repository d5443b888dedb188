"""The registered backbone: any other registered one, with non-local blocks put into it."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from nl_detectron.config import block_options
from nl_detectron.modeling.insertion import (
    check_after_blocks,
    find_stages,
    insert_nonlocal_blocks,
)
from nl_detectron.validation import check_choice

_AFTER_BLOCKS = "MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE"
# Those that build MODEL.NONLOCAL.BACKBONE: naming one there would have no end.
_WRAPPERS = ("build_nonlocal_backbone", "build_local_control_backbone")


@BACKBONE_REGISTRY.register()
def build_nonlocal_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """
    Build ``cfg.MODEL.NONLOCAL.BACKBONE`` and insert blocks as ``cfg.MODEL.NONLOCAL`` says.

    Raises:
        ValueError: a value in ``MODEL.NONLOCAL`` is not legal; the message names the key.
    """
    options = block_options(cfg)
    node = cfg.MODEL.NONLOCAL
    builders = sorted(name for name, _ in BACKBONE_REGISTRY if name not in _WRAPPERS)
    check_choice("MODEL.NONLOCAL.BACKBONE", node.BACKBONE, builders)
    _check_lists(node.AFTER_BLOCKS_PER_STAGE)

    backbone = BACKBONE_REGISTRY.get(node.BACKBONE)(cfg, input_shape)
    if not any(node.AFTER_BLOCKS_PER_STAGE):
        return backbone
    # How many blocks a stage has, the backbone alone knows; nothing else is built yet.
    stages = find_stages(backbone)
    names = list(stages)
    after_blocks = {}
    for position, indices in enumerate(node.AFTER_BLOCKS_PER_STAGE):
        if indices and position >= len(names):
            raise ValueError(
                f"{_AFTER_BLOCKS} asks for blocks in stage number {position + 1}, but "
                f"{node.BACKBONE} has {len(names)} with this config: {', '.join(names)}"
            )
        if indices:
            after_blocks[names[position]] = indices
    try:
        check_after_blocks(stages, after_blocks)
    except ValueError as error:
        raise ValueError(f"{_AFTER_BLOCKS} is {node.AFTER_BLOCKS_PER_STAGE}: {error}") from error
    try:
        return insert_nonlocal_blocks(backbone, after_blocks, **options)
    except ValueError as error:
        raise ValueError(f"MODEL.NONLOCAL: {error}") from error


def _check_lists(after_blocks_per_stage: Any) -> None:
    sequence = (list, tuple)
    if not isinstance(after_blocks_per_stage, sequence) or not all(
        isinstance(indices, sequence) for indices in after_blocks_per_stage
    ):
        raise ValueError(
            f"{_AFTER_BLOCKS} is {after_blocks_per_stage!r}, but must be a list with a list of "
            "block indices for each stage, such as [[], [], [-2], []]"
        )
