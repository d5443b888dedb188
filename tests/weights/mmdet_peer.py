"""
mmdetection's own detectors with random weights: what a conversion is compared with.

mmdet is installed without what it depends on. It asks for ``mmcv.ops``, which mmcv-lite lacks, and
for an older mmcv; what its detectors use of the operators here is torchvision's.
"""

import copy
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn


class RoIAlign(nn.Module):
    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, aligned=True, **_):
        super().__init__()
        self.output_size = (output_size, output_size)
        self.options = spatial_scale, sampling_ratio or -1, aligned

    def forward(self, x, rois):
        return torchvision.ops.roi_align(x, rois, self.output_size, *self.options)


def batched_nms(boxes, scores, idxs, nms_cfg, class_agnostic=False):
    kept = torchvision.ops.batched_nms(boxes, scores, idxs, nms_cfg["iou_threshold"])
    return torch.cat([boxes[kept], scores[kept, None]], 1), kept


class _Operators(types.ModuleType):
    """What is imported but not used is a class of its own."""

    __path__ = []
    RoIAlign, batched_nms = RoIAlign, staticmethod(batched_nms)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if f"{name}.".startswith("mmcv.ops."):
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        return _Operators(spec.name)

    def exec_module(self, module):
        pass


def is_installed():
    return importlib.util.find_spec("mmdet") is not None


def load():
    """mmdet, imported with the stand-in and its modules registered."""
    warnings.simplefilter("ignore")
    import mmcv

    if "mmdet" not in sys.modules:
        sys.meta_path.insert(0, _Finder())
        version, mmcv.__version__ = mmcv.__version__, "2.1.0"
        try:
            import mmdet.utils

            mmdet.utils.register_all_modules()
        finally:
            mmcv.__version__ = version
    return sys.modules["mmdet"]


def read_config(name, **model):
    """A config of mmdet's, with some parts of its model changed."""
    mmdet = load()
    from mmengine.config import Config

    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    cfg = Config.fromfile(folder / f"{name}.py")
    cfg.merge_from_dict({"model": model})
    return cfg


def tiny(width=8, channels=16, **backbone):
    """What makes an R-CNN with an FPN as narrow as possible."""
    return {
        "backbone": {"base_channels": width, **backbone},
        "neck": {"in_channels": [width * 2**i for i in range(2, 6)], "out_channels": channels},
        "rpn_head": {"in_channels": channels, "feat_channels": channels},
        "roi_head": {
            "bbox_roi_extractor": {"out_channels": channels},
            "bbox_head": {"in_channels": channels, "fc_out_channels": 2 * channels},
            "mask_roi_extractor": {"out_channels": channels},
            "mask_head": {"in_channels": channels, "conv_out_channels": channels},
        },
    }


class Detector:
    """A detector of theirs whose weights are random, but whose detections on ``image`` are not."""

    def __init__(self, name, image, change=lambda model: None, **model):
        """``change`` is called with the model once it is built."""
        cfg = read_config(name, **model)
        self.config = cfg.pretty_text
        self.image = image  # (3, H, W), uint8, BGR
        from mmdet.registry import MODELS
        from mmdet.structures import DetDataSample

        settings = copy.deepcopy(cfg.model)
        settings.backbone.init_cfg = None
        torch.manual_seed(0)
        self.model = MODELS.build(settings)
        change(self.model)
        self.model.eval()
        size = tuple(image.shape[1:])
        sizes = {"img_shape": size, "ori_shape": size, "pad_shape": size, "batch_input_shape": size}
        self._sample = DetDataSample(metainfo={**sizes, "scale_factor": (1.0, 1.0)})
        with torch.no_grad():
            self._randomise()
            data = self.model.data_preprocessor(
                {"inputs": [image], "data_samples": [self._sample]}, False
            )
            self.input, self._samples = data["inputs"], data["data_samples"]
            self.features = self.model.extract_feat(self.input)
            self._calibrate()
            self.rpn = self.model.rpn_head(self.features)
            self.boxes = self.model.roi_head._bbox_forward(self.features, self.rois)
            if self.model.with_mask:
                heads = self.model.roi_head._mask_forward(self.features, self.rois)
                self.masks = heads["mask_preds"]
            found = self.model.predict(self.input, self._samples, rescale=False)[0].pred_instances
            width, height = (found.bboxes[:, 2:] - found.bboxes[:, :2]).unbind(1)
            self.detections = found[(width > 0) & (height > 0)]  # Detectron2 drops the others

    def checkpoint(self):
        """As mmengine saves it."""
        return {"meta": {"cfg": self.config}, "state_dict": self.model.state_dict()}

    def _randomise(self):
        """Statistics, scales and offsets that are not trivial, and blocks that take part."""
        generator = torch.Generator().manual_seed(1)
        for name, tensor in self.model.state_dict().items():
            leaf = name.rpartition(".")[2]
            noise = torch.randn(tensor.shape, generator=generator)
            if leaf == "running_var" or (leaf == "weight" and tensor.dim() == 1):
                scale = 0.3 if ".bn3." in name else 1.0  # or a deep network's features grow
                tensor.copy_(scale * (0.5 + torch.rand(tensor.shape, generator=generator)))
            elif leaf in ("running_mean", "bias"):
                tensor.copy_(0.02 * noise)
            elif "_block." in name or "refine" in name:
                # What is the same at every place must not drown the rest, in single precision.
                scale = 0.1 if "channel_add_conv.3" in name else 1.0
                tensor.copy_(scale * noise / tensor[0].numel() ** 0.5)

    def _calibrate(self):
        """
        Heads with a mean of 0 and a fixed spread: some detections, none of them certain. The
        region proposals' logits stay where a sigmoid, by which theirs are sorted, tells them apart.
        """
        head, rpn = self.model.roi_head.bbox_head, self.model.rpn_head
        for layer, spread, outputs in (
            (rpn.rpn_cls, 0.5, lambda: torch.cat([y.flatten(2) for y in rpn(self.features)[0]], 2)),
            (rpn.rpn_reg, 0.3, lambda: torch.cat([y.flatten(2) for y in rpn(self.features)[1]], 2)),
        ):
            _centre(layer, spread, outputs)
        found = rpn.predict(self.features, self._samples, rescale=False)[0].bboxes[:60]
        self.rois = torch.cat([found.new_zeros(len(found), 1), found], 1)
        roi_head = self.model.roi_head
        for layer, spread, key in (
            (head.fc_cls, 1.2, "cls_score"),
            (head.fc_reg, 0.5, "bbox_pred"),
        ):
            _centre(
                layer, spread, lambda key=key: roi_head._bbox_forward(self.features, self.rois)[key]
            )
        proposals = rpn.predict(self.features, self._samples, rescale=False)[0].bboxes
        rois = torch.cat([proposals.new_zeros(len(proposals), 1), proposals], 1)
        logits = roi_head._bbox_forward(self.features, rois)["cls_score"]
        while (logits.softmax(1)[:, :-1] > 0.05).sum() > 120:
            logits[:, -1] += 0.25  # the background's
            head.fc_cls.bias[-1] += 0.25
        if self.model.with_mask:
            _centre(
                roi_head.mask_head.conv_logits,
                2.0,
                lambda: roi_head._mask_forward(self.features, self.rois)["mask_preds"],
            )


def _centre(layer, spread, outputs):
    """Give each output channel (dimension 1) a mean of 0 and this standard deviation."""
    for change in ("weight", "bias"):
        y = outputs().transpose(0, 1).flatten(1)
        if change == "weight":
            scale = spread / y.std(1)
            layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        else:
            layer.bias.sub_(y.mean(1))
