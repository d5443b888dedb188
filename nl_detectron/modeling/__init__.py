from nl_detectron.modeling.backbone import build_nonlocal_backbone
from nl_detectron.modeling.insertion import insert_nonlocal_blocks
from nl_detectron.modeling.keypoint_head import NonLocalKeypointHead
from nl_detectron.modeling.local_block import build_local_control_backbone
from nl_detectron.modeling.topless_fpn import build_resnet_topless_fpn_backbone

__all__ = [
    "NonLocalKeypointHead",
    "build_local_control_backbone",
    "build_nonlocal_backbone",
    "build_resnet_topless_fpn_backbone",
    "insert_nonlocal_blocks",
]
