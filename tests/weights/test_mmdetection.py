"""Whole detectors, compared with mmdetection's own code."""

import functools
import hashlib
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from nl_detectron import model_zoo
from nl_detectron.weights import ConversionError, convert
from nl_detectron.weights.mmdetection import config_of
from nl_detectron.weights.mmdetection_config import nested, read_detector
from nl_detectron.weights.python_config import Unread, read_python_config
from tests.weights.mmdet_peer import Detector, is_installed, read_config, tiny

mmcv = pytest.importorskip("mmcv")
pytestmark = pytest.mark.skipif(not is_installed(), reason="mmdet is not installed")

ROOT = Path(__file__).resolve().parents[2]
MASK, LIBRA = "mask_rcnn/mask-rcnn_r50_fpn_1x_coco", "libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco"


def merged(*changes):
    """Of nested dicts, the later ones' values."""
    result = {}
    for change in changes:
        for key, value in change.items():
            old = result.get(key)
            both = isinstance(old, dict) and isinstance(value, dict)
            result[key] = merged(old, value) if both else value
    return result


def libra(refine_type):
    model = tiny()
    head = {key: value for key, value in model["roi_head"].items() if "bbox" in key}
    pyramid = {"in_channels": 16, "refine_type": refine_type}
    return {**model, "neck": {"0": model["neck"], "1": pyramid}, "roi_head": head}


def conventions_of_1x():
    align = {"roi_layer": {"aligned": False, "sampling_ratio": 2}}
    return {
        "rpn_head": {"anchor_generator": {"center_offset": 0.5}},
        "roi_head": {"bbox_roi_extractor": align, "mask_roi_extractor": align},
    }


def with_norms(kind, width):
    """Norms everywhere, and a box head of 4 convolutions."""
    norm = {"norm_cfg": {"type": kind}}
    head = {"type": "Shared4Conv1FCBBoxHead", "conv_out_channels": width, **norm}
    return {"neck": norm, "roi_head": {"bbox_head": head, "mask_head": norm}}


def after_sum(name, kind, **options):
    """A block of mmcv's in the fifth bottleneck of res4, as DNL-Object-Detection has its blocks."""

    def change(model):
        unit = model.backbone.layer3[4]
        unit.add_module(name, getattr(mmcv.cnn, kind)(128, **options))

        class AfterSum(type(unit)):
            def forward(self, x):
                y = self.relu(self.norm1(self.conv1(x)))
                y = self.norm3(self.conv3(self.relu(self.norm2(self.conv2(y)))))
                return self.relu(getattr(self, name)(y + x))

        unit.__class__ = AfterSum

    return change


DNL = merged(tiny(), with_norms("BN", 16), conventions_of_1x())
# Theirs, as narrow as can be, and how they are changed once they are built.
DETECTORS = {
    "mask_rcnn": (MASK, tiny()),
    "caffe": ("mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco", tiny()),
    "gc_r4": ("gcnet/mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco", tiny()),
    "gc_r16_syncbn": ("gcnet/mask-rcnn_r50-syncbn-gcb-r16-c3-c5_fpn_1x_coco", tiny()),
    "x101_gc": (
        "gcnet/mask-rcnn_x101-32x4d-syncbn-gcb-r4-c3-c5_fpn_1x_coco",
        tiny(groups=4, base_width=2),
    ),
    "libra": (LIBRA, libra("non_local")),
    "libra_conv": (LIBRA, libra("conv")),
    "libra_unrefined": (LIBRA, libra(None)),
    "gn": (
        "gn/mask-rcnn_r50_fpn_gn-all_2x_coco",
        merged(tiny(32, 32), {"roi_head": {"bbox_head": {"conv_out_channels": 32}}}),
    ),
    "gcnet_1x": (
        "gcnet/mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco",
        merged(tiny(), conventions_of_1x()),
    ),
    "dnl_none": (MASK, DNL),
    "dnl_nl": (MASK, DNL, after_sum("nonlocal_block", "NonLocal2d", reduction=4, norm_cfg=None)),
    "dnl_gc": (MASK, DNL, after_sum("context_block", "ContextBlock", ratio=1 / 4)),
}
# The lines of a config of 1.x that the others do not have.
OF_1X = {
    "gcnet_1x": "gcb=dict(ratio=1./4.), stage_with_gcb=(False, True, True, True)",
    "dnl_none": "non_inplace=True",
    "dnl_nl": "nlb=dict(mode='embedded_gaussian', reduction=4, fixbug=True), "
    "stage_with_nlb=[[], [], [-2], []]",
    "dnl_gc": "gcb=dict(ratio=1./4.), stage_with_gcb=[[], [], [-2], []]",
}


def picture():
    """Shapes of several sizes on noise, (3, 400, 600), uint8."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 60, (3, 400, 600), generator=generator)
    for size in (30, 60, 90, 140, 200):
        top, left = (int(torch.randint(0, n - size, (), generator=generator)) for n in (400, 600))
        color = torch.randint(60, 195, (3, 1, 1), generator=generator)
        image[:, top : top + size, left : left + size] += color
    return image.to(torch.uint8)


def config_1x(name):
    """What 1.x calls the same detector: its own names of keys."""
    is_dnl = name.startswith("dnl")
    norm = f"norm_cfg=dict(type={'SyncABN' if is_dnl else 'BN'!r}, requires_grad=True)"
    norms = f", {norm}" if is_dnl else ""
    head = (
        "type='ConvFCBBoxHead', num_shared_convs=4, num_shared_fcs=1, conv_out_channels=16"
        if is_dnl
        else "type='SharedFCBBoxHead', num_fcs=2"
    )
    return f"""
model = dict(
    type='MaskRCNN', pretrained='modelzoo://resnet50',
    backbone=dict(type='ResNet', depth=50, num_stages=4, out_indices=(0, 1, 2, 3),
                  base_channels=8, frozen_stages=1, style='pytorch', {norm}, {OF_1X[name]}),
    neck=dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=16, num_outs=5{norms}),
    rpn_head=dict(type='RPNHead', in_channels=16, feat_channels=16, anchor_scales=[8],
                  anchor_ratios=[0.5, 1.0, 2.0], anchor_strides=[4, 8, 16, 32, 64],
                  target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0]),
    bbox_roi_extractor=dict(type='SingleRoIExtractor', out_channels=16,
                            roi_layer=dict(type='RoIAlign', out_size=7, sample_num=2),
                            featmap_strides=[4, 8, 16, 32]),
    bbox_head=dict({head}, in_channels=16, fc_out_channels=32,
                   roi_feat_size=7, num_classes=81, target_means=[0., 0., 0., 0.],
                   target_stds=[0.1, 0.1, 0.2, 0.2], reg_class_agnostic=False{norms}),
    mask_roi_extractor=dict(type='SingleRoIExtractor', out_channels=16,
                            roi_layer=dict(type='RoIAlign', out_size=14, sample_num=2),
                            featmap_strides=[4, 8, 16, 32]),
    mask_head=dict(type='FCNMaskHead', num_convs=4, in_channels=16, conv_out_channels=16,
                   num_classes=81{norms}))
test_cfg = dict(
    rpn=dict(nms_across_levels=False, nms_pre=1000, nms_post=1000, max_num=1000, nms_thr=0.7,
             min_bbox_size=0),
    rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_thr=0.5), max_per_img=100,
              mask_thr_binary=0.5))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""


@functools.cache
def theirs_and_ours(name):
    config, model, *change = DETECTORS[name]
    theirs = Detector(config, picture(), *change, **model)
    return theirs, *build(convert(checkpoint_of(name, theirs)))


def checkpoint_of(name, theirs):
    """As mmengine saves it, or as 1.x did: with the background first, and DNL's in-place ABN."""
    if name not in OF_1X:
        return theirs.checkpoint()
    tensors, is_dnl = {}, name.startswith("dnl")
    for key, tensor in theirs.model.state_dict().items():
        if ".fc_cls." in key:
            tensor = torch.cat([tensor[-1:], tensor[:-1]])
        elif ".fc_reg." in key:
            tensor = torch.cat([tensor[:4] + 1, tensor])
        elif ".conv_logits." in key:
            tensor = torch.cat([tensor[:1] + 1, tensor])
        elif is_dnl and (".bn" in f".{key}" or ".downsample.1." in key):
            if key.endswith("num_batches_tracked"):
                continue
            if key.endswith("weight"):  # it computes |weight| + epsilon
                tensor = (tensor - 1e-5) * torch.tensor([1.0, -1.0]).repeat(len(tensor) // 2)
        tensors[key.removeprefix("roi_head.")] = tensor
    return {"meta": {"config": config_1x(name)}, "state_dict": tensors}


def build(conversion):
    """The conversion, and the model of its config with its tensors."""
    cfg = config_of(conversion.settings)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    model.load_state_dict(conversion.state_dict)
    return conversion, cfg, model


def input_of(cfg, image):
    image = image if cfg.INPUT.FORMAT == "BGR" else image.flip(0)
    return {"image": image, "height": image.shape[1], "width": image.shape[2]}


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_every_part_computes_what_theirs_does(name):
    theirs, _, cfg, ours = theirs_and_ours(name)
    images = ours.preprocess_image([input_of(cfg, theirs.image)])
    assert_close(images.tensor, theirs.input)
    features = ours.backbone(images.tensor)
    for level, feature in zip(features.values(), theirs.features, strict=True):
        assert_close(level, feature)
    for found, expected in zip(
        ours.proposal_generator.rpn_head(list(features.values())), theirs.rpn, strict=True
    ):
        for level, level_expected in zip(found, expected, strict=True):
            assert_close(level, level_expected)
    heads = ours.roi_heads
    levels = [features[f] for f in heads.box_in_features]
    boxes = [Boxes(theirs.rois[:, 1:])]
    scores, deltas = heads.box_predictor(heads.box_head(heads.box_pooler(levels, boxes)))
    assert_close(scores, theirs.boxes["cls_score"])
    assert_close(deltas, theirs.boxes["bbox_pred"])
    if cfg.MODEL.MASK_ON:
        masks = heads.mask_head.layers(heads.mask_pooler(levels, boxes))
        assert_close(masks, theirs.masks)


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_detections_are_theirs(name):
    theirs, _, cfg, ours = theirs_and_ours(name)
    found = ours([input_of(cfg, theirs.image)])[0]["instances"]
    expected = theirs.detections
    assert len(found) == len(expected) > 20
    assert len(set(expected.labels.tolist())) > 5
    order = _matches(found, expected)
    assert (found.pred_classes == expected.labels[order]).all()
    assert (found.scores - expected.scores[order]).abs().max() <= 1e-5
    assert (found.pred_boxes.tensor - expected.bboxes[order]).abs().max() <= 1e-2
    if cfg.MODEL.MASK_ON:
        pair = found.pred_masks, expected.masks[order]
        both, either = (pair[0] & pair[1]).sum((1, 2)), (pair[0] | pair[1]).sum((1, 2))
        assert (either > 0).sum() > 20
        assert (both >= 0.999 * either).all()


def _matches(found, expected):
    """For each of ours the one of theirs with this class that is nearest; none twice."""
    distance = torch.cdist(found.pred_boxes.tensor, expected.bboxes, p=1)
    distance[found.pred_classes[:, None] != expected.labels] = torch.inf
    order = distance.argmin(1)
    assert len(set(order.tolist())) == len(order)
    return order


# Of GCNet's own code the configs are not installed.
OFFERED = {row["config"]: row for row in model_zoo.list_trained() if "config" in row}


@pytest.mark.parametrize("name", OFFERED)
def test_every_trained_detector_can_be_read(name):
    row, text = OFFERED[name], read_config(name).pretty_text
    cfg = config_of(nested(read_detector(read_python_config(text))))
    resnets = cfg.MODEL.RESNETS
    resnet = (
        f"R{resnets.DEPTH}"
        if resnets.NUM_GROUPS == 1
        else (f"X{resnets.DEPTH}-{resnets.NUM_GROUPS}x{resnets.WIDTH_PER_GROUP}d")
    )
    assert row["model"] == f"{'Mask' if cfg.MODEL.MASK_ON else 'Faster'} R-CNN {resnet}"
    assert ("caffe" in row["schedule"]) == resnets.STRIDE_IN_1X1
    assert (resnets.NORM == "SyncBN") == ("SyncBN" in row["schedule"])
    block = {
        "build_resnet_fpn_backbone": None,
        "build_balanced_fpn_backbone": "non-local",
        "build_nonlocal_backbone": f"global context, r = {cfg.MODEL.NONLOCAL.REDUCTION}",
    }
    assert row.get("block") == block[cfg.MODEL.BACKBONE.NAME]


# Keys of their configs, and a value of each that Detectron2 does not compute.
REFUSED = {
    "model.type": "CascadeRCNN",
    "model.backbone.type": "HRNet",
    **{f"model.backbone.{key}": 3 for key in ("num_stages", "depth", "new_key", "dcn", "conv_cfg")},
    **{f"model.backbone.{key}": True for key in ("deep_stem", "avg_down")},
    "model.backbone.strides": [1, 2, 2, 1],
    "model.backbone.dilations": [1, 1, 1, 2],
    "model.backbone.out_indices": [1, 2, 3],
    "model.backbone.in_channels": 4,
    "model.backbone.norm_cfg.type": "IN",
    "model.backbone.norm_cfg.eps": 1e-3,
    "model.neck.type": "PAFPN",
    "model.neck.num_outs": 6,
    "model.neck.start_level": 1,
    "model.neck.end_level": 2,
    "model.neck.add_extra_convs": "on_input",
    "model.neck.no_norm_on_lateral": True,
    "model.neck.act_cfg": {"type": "ReLU"},
    "model.neck.upsample_cfg": {"mode": "bilinear"},
    "model.rpn_head.type": "GARPNHead",
    "model.rpn_head.num_convs": 2,
    "model.rpn_head.anchor_generator.type": "YOLOAnchorGenerator",
    "model.rpn_head.anchor_generator.strides": [8, 16, 32, 64, 128],
    "model.rpn_head.anchor_generator.scales": [4, 8],
    "model.roi_head.type": "CascadeRoIHead",
    "model.roi_head.shared_head": {"type": "ResLayer"},
    **{
        f"model.{head}.bbox_coder.clip_border": False for head in ("rpn_head", "roi_head.bbox_head")
    },
    **{f"model.{head}.bbox_coder.target_stds": [2] for head in ("rpn_head", "roi_head.bbox_head")},
    **{f"model.{head}.bbox_coder.target_means": [2] for head in ("rpn_head", "roi_head.bbox_head")},
    "model.roi_head.bbox_head.bbox_coder.add_ctr_clamp": True,
    "model.roi_head.bbox_head.num_cls_fcs": 1,
    "model.roi_head.bbox_head.with_avg_pool": True,
    "model.roi_head.bbox_head.reg_predictor_cfg": {"type": "NormedLinear"},
    "model.roi_head.mask_head.type": "GridHead",
    "model.roi_head.mask_head.conv_kernel_size": 1,
    "model.roi_head.mask_head.upsample_cfg": {"type": "nearest"},
    **{
        f"model.roi_head.{head}_roi_extractor.{key}": value
        for head in ("bbox", "mask")
        for key, value in {
            "type": "GenericRoIExtractor",
            "featmap_strides": [8, 16, 32],
            "finest_scale": 28,
            "roi_layer.type": "RoIPool",
            "roi_layer.pool_mode": "max",
        }.items()
    },
    "model.test_cfg.rpn.min_bbox_size": 1,
    "model.test_cfg.rpn.nms.type": "soft_nms",
    "model.test_cfg.rcnn.nms.type": "soft_nms",
    "model.test_cfg.rcnn.mask_thr_binary": 0.4,
    "model.data_preprocessor.pad_size_divisor": 16,
    "model.data_preprocessor.type": "TwoStreamPreprocessor",
}


@functools.cache
def text_of(name):
    return read_config(name).pretty_text


def config_with(changes, name=MASK):
    """A config of theirs, read as text, with other values of some keys."""
    config = read_python_config(text_of(name))
    for path, value in changes.items():
        *nodes, key = path.split(".")
        node = config
        for name in nodes:
            node = node[int(name) if name.isdecimal() else name]
        node[key] = value
    return config


@pytest.mark.parametrize("path", REFUSED)
def test_what_detectron2_does_not_compute_is_refused_by_name(path):
    with pytest.raises(ConversionError, match=rf"{path}\b") as error:
        read_detector(config_with({path: REFUSED[path]}))
    assert "\n" not in str(error.value)


PLUGIN = {"cfg": {"type": "ContextBlock", "ratio": 1 / 4}, "position": "after_conv3"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (MASK, {"model.backbone.plugins": [PLUGIN, PLUGIN]}, "plugins are 2; only one"),
        (MASK, {"model.backbone.plugins": [{**PLUGIN, "position": "after_conv2"}]}, "after_conv2"),
        *(
            (
                MASK,
                {"model.backbone.plugins": [{**PLUGIN, "cfg": {**PLUGIN["cfg"], **change}}]},
                key,
            )
            for key, change in {
                "type is 'GeneralizedAttention'": {"type": "GeneralizedAttention"},
                "pooling_type is 'avg'": {"pooling_type": "avg"},
                r"fusion_types is \['channel_mul'\]": {"fusion_types": ["channel_mul"]},
            }.items()
        ),
        (
            LIBRA,
            {"model.backbone.plugins": [PLUGIN]},
            r"plugins and the BFP in model\.neck are blocks",
        ),
        (LIBRA, {"model.neck.1.num_levels": 4}, r"model\.neck\.num_levels is 4"),
        (LIBRA, {"model.neck.1.refine_level": 1}, r"model\.neck\.refine_level is 1"),
        (LIBRA, {"model.neck.1.norm_cfg": {"type": "BN"}}, r"model\.neck\.norm_cfg is"),
    ],
)
def test_blocks_that_are_not_converted(name, changes, message):
    with pytest.raises(ConversionError, match=message):
        read_detector(config_with(changes, name))


@pytest.mark.parametrize(
    ("changes", "norm", "freeze_at"),
    [
        ({}, "FrozenBN", 2),
        ({"norm_eval": False}, "BN", 2),
        ({"norm_cfg": {"type": "SyncBN"}, "norm_eval": False, "frozen_stages": -1}, "SyncBN", 0),
        ({"norm_cfg": {"type": "BN", "requires_grad": False}, "norm_eval": False}, "FrozenBN", 2),
    ],
)
def test_what_matters_to_training_only(changes, norm, freeze_at):
    changes = {f"model.backbone.{key}": value for key, value in changes.items()}
    settings = read_detector(config_with(changes))
    assert settings["MODEL.RESNETS.NORM"] == norm
    assert settings["MODEL.BACKBONE.FREEZE_AT"] == freeze_at
    assert (settings["INPUT.MIN_SIZE_TEST"], settings["INPUT.MAX_SIZE_TEST"]) == (800, 1333)


def test_every_tensor_is_used_or_named():
    theirs, conversion, _, _ = theirs_and_ours("mask_rcnn")
    checkpoint = theirs.checkpoint()
    sources = {row.source: row for row in conversion.rows}
    assert sources.keys() == checkpoint["state_dict"].keys() | {"meta"}
    left_out = [row.source for row in conversion.rows if not row.target]
    assert all(name == "meta" or name.endswith("num_batches_tracked") for name in left_out)
    last = "roi_head.bbox_head.fc_cls.bias"
    tensors = checkpoint["state_dict"]
    for changed, message in [
        ({last: None}, "roi_heads.box_predictor.cls_score.bias of the detector of the config is"),
        ({last: tensors[last][1:]}, "of shape (80,), but the detector of the config has (81,)"),
        ({"roi_head.bbox_head.fc_iou.bias": tensors[last]}, "fc_iou.bias of shape (81,) has no"),
    ]:
        broken = {k: v for k, v in (tensors | changed).items() if v is not None}
        with pytest.raises(ConversionError) as error:
            convert({**checkpoint, "state_dict": broken})
        assert message in str(error.value)
    averages = {"ema_backbone_conv1_weight": tensors["backbone.conv1.weight"]}
    with_averages = convert({**checkpoint, "state_dict": tensors | averages})
    assert with_averages.state_dict.keys() == conversion.state_dict.keys()


def test_a_file_without_a_config_asks_for_it():
    theirs, conversion, _, _ = theirs_and_ours("mask_rcnn")
    checkpoint = {"state_dict": theirs.model.state_dict(), "meta": {"epoch": 12}}
    with pytest.raises(ConversionError, match=r"--detector-config FILE\.py"):
        convert(checkpoint)
    given = convert(checkpoint, detector_config=theirs.config)
    assert given.settings == conversion.settings
    with pytest.raises(ConversionError, match="is not Python"):
        convert(checkpoint, detector_config="model = dict(")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gcb=dict(ratio=1./4., simple=True), stage_with_gcb=[[], [], [-2], []]", "simple is True"),
        ("nlgcb=dict(ratio=1./4.)", "backbone.nlgcb: DNL's own gamma multiplies the pairs' term"),
        ("nlb=dict(reduction=4), stage_with_nlb=[[], [], [-2], []]", "fixbug is False"),
        ("dcn=dict(type='x')", "model.backbone.dcn is"),
    ],
)
def test_what_is_not_converted_of_1x(change, message):
    checkpoint = checkpoint_of("dnl_none", theirs_and_ours("dnl_none")[0])
    text = checkpoint["meta"]["config"].replace("non_inplace=True", change)
    with pytest.raises(ConversionError, match=message):
        convert({**checkpoint, "meta": {"config": text}})


@pytest.mark.parametrize("name", ["dnl_none", "mask_rcnn"])
@pytest.mark.parametrize("key", ["neck", "rpn_head", "backbone", "bbox_head"])
@pytest.mark.parametrize("value", ["5", "None"])
def test_configs_of_another_form_are_refused_in_one_line(name, key, value):
    checkpoint = checkpoint_of(name, theirs_and_ours(name)[0])
    text = checkpoint["meta"].get("config") or checkpoint["meta"]["cfg"]
    assert f" {key}=dict(" in text
    text = text.replace(f" {key}=dict(", f" {key}={value}, other=dict(")
    with pytest.raises(ConversionError) as error:
        convert({**checkpoint, "meta": {"config": text}})
    assert "\n" not in str(error.value)


def test_what_1x_rounds_is_said():
    _, conversion, *_ = theirs_and_ours("gcnet_1x")
    assert any("1.x rounds its anchors" in note for note in conversion.notes)


def test_other_classes():
    three = {"num_classes": 3}
    heads = {"roi_head": {"bbox_head": three, "mask_head": three}}
    theirs = Detector(MASK, picture(), **merged(tiny(), heads))
    checkpoint = theirs.checkpoint()
    checkpoint["meta"]["dataset_meta"] = {"CLASSES": ("cat", "dog", "cow")}
    conversion, cfg, model = build(convert(checkpoint))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert any("cat, dog, cow" in note for note in conversion.notes)
    found = model([input_of(cfg, theirs.image)])[0]["instances"]
    assert len(found) == len(theirs.detections)


def test_a_trained_detector_by_its_name(tmp_path, monkeypatch):
    theirs, _, _, ours = theirs_and_ours("libra")
    file = tmp_path / "downloaded.pth"
    torch.save(theirs.checkpoint(), file)
    beginning = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    right, wrong = f"libra-{beginning}.pth", "libra-00000000.pth"
    monkeypatch.setattr(model_zoo, "list_trained", lambda: [{"file": right}, {"file": wrong}])
    model = model_zoo.get_trained(right, file, device="cpu").eval()
    assert all(map(torch.equal, model.state_dict().values(), ours.state_dict().values()))
    with pytest.raises(ValueError, match=f"its SHA-256 begins with {beginning}, not with 00000000"):
        model_zoo.get_trained(wrong, file)
    with pytest.raises(ValueError, match="name is 'libra', but must be one of"):
        model_zoo.get_trained("libra", file)


def test_configs_are_read_and_never_run(tmp_path):
    touched = tmp_path / "touched"
    values = read_python_config(
        f"a = open({str(touched)!r}, 'w')\nb = dict(c=1. / 4, d=[-1, (2, 3)], e=a)\n"
        "f = dict(b, g=1)\nh = {'i': b, 'j': 1 / 0}\nimport os\nk = __import__('os')\n"
    )
    assert not touched.exists()
    assert values["b"] == {"c": 0.25, "d": [-1, [2, 3]], "e": values["a"]}
    assert values["h"]["i"] == values["b"]
    for unread in (values["a"], values["f"], values["h"]["j"], values["k"]):
        assert isinstance(unread, Unread)
