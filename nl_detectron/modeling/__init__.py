from nl_detectron.modeling.backbone import build_nonlocal_backbone
from nl_detectron.modeling.insertion import insert_nonlocal_blocks
from nl_detectron.modeling.keypoint_head import NonLocalKeypointHead

__all__ = ["NonLocalKeypointHead", "build_nonlocal_backbone", "insert_nonlocal_blocks"]
