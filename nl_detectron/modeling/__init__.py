from nl_detectron.modeling.backbone import (
    build_balanced_fpn_backbone,
    build_nonlocal_backbone,
    build_resnet_fpn_no_top_block_backbone,
)
from nl_detectron.modeling.blocks import (
    NONLOCAL_BLOCK_REGISTRY,
    build_block,
    gamma_parameters,
    mean_abs_gamma,
    nonlocal_blocks,
    out_weight_norm,
)
from nl_detectron.modeling.insertion import insert_blocks, insert_nonlocal_blocks
from nl_detectron.modeling.keypoint_head import NonLocalKeypointHead
from nl_detectron.modeling.stages import find_stages

__all__ = [
    "NONLOCAL_BLOCK_REGISTRY",
    "NonLocalKeypointHead",
    "build_balanced_fpn_backbone",
    "build_block",
    "build_nonlocal_backbone",
    "build_resnet_fpn_no_top_block_backbone",
    "find_stages",
    "gamma_parameters",
    "insert_blocks",
    "insert_nonlocal_blocks",
    "mean_abs_gamma",
    "nonlocal_blocks",
    "out_weight_norm",
]
