from nl_detectron.modeling.backbone import (
    build_nonlocal_backbone,
    build_resnet_fpn_no_top_block_backbone,
)
from nl_detectron.modeling.blocks import (
    NONLOCAL_BLOCK_REGISTRY,
    build_block,
    mean_abs_gamma,
    nonlocal_blocks,
    norm_after_out,
    out_weight_norm,
)
from nl_detectron.modeling.insertion import find_stages, insert_blocks, insert_nonlocal_blocks
from nl_detectron.modeling.keypoint_head import NonLocalKeypointHead

__all__ = [
    "NONLOCAL_BLOCK_REGISTRY",
    "NonLocalKeypointHead",
    "build_block",
    "build_nonlocal_backbone",
    "build_resnet_fpn_no_top_block_backbone",
    "find_stages",
    "insert_blocks",
    "insert_nonlocal_blocks",
    "mean_abs_gamma",
    "nonlocal_blocks",
    "norm_after_out",
    "out_weight_norm",
]
