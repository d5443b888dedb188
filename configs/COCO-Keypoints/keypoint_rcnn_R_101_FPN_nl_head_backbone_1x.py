# keypoint_rcnn_R_101_FPN_nl_head_backbone_1x.yaml as one of Detectron2's LazyConfigs, for
# tools/lazy_train_net.py. What the paper says and where it is silent stands there and in
# ../Base-Keypoint-RCNN-FPN.yaml.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from nl_detectron import NonLocalKeypointHead, insert_nonlocal_blocks

model = model_zoo.get_config("common/models/keypoint_rcnn_fpn.py").model
dataloader = model_zoo.get_config("common/data/coco_keypoint.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train = model_zoo.get_config("common/train.py").train

model.backbone.bottom_up.freeze_at = 2
model.backbone.bottom_up.stages.depth = 101
model.backbone = L(insert_nonlocal_blocks)(
    module=model.backbone, places={"res4": [-2]}, subsample="embeddings"
)
model.roi_heads.keypoint_head.update(
    _target_=NonLocalKeypointHead,
    nonlocal_every=2,
    nonlocal_options={"subsample": "embeddings"},
)

dataloader.evaluator.use_fast_impl = False
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
