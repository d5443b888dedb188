# mask_rcnn_R_50_FPN_dnl_1x.yaml as one of Detectron2's LazyConfigs, for tools/lazy_train_net.py.
from detectron2.config import LazyConfig

_base = LazyConfig.load_rel("../COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.py")
model, train = _base.model, _base.train
dataloader, optimizer, lr_multiplier = _base.dataloader, _base.optimizer, _base.lr_multiplier

model.backbone.pairwise = "disentangled"
model.backbone.reduction = 4
model.backbone.subsample = "none"
