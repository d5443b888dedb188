"""Whole detectors, compared with mmdetection's own code."""

import functools
import hashlib

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from nl_detectron import model_zoo
from nl_detectron.weights import ConversionError, convert
from nl_detectron.weights.mmdetection import config_of, nested, read_detector
from nl_detectron.weights.python_config import Unread, read_python_config
from tests.weights.mmdet_peer import Detector, is_installed, read_config

pytestmark = pytest.mark.skipif(not is_installed(), reason="mmdet is not installed")

# Theirs, and what else is changed in it.
DETECTORS = {
    "mask_rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco",
    "caffe": "mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco",
    "gc_r4": "gcnet/mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco",
    "gc_r16_syncbn": "gcnet/mask-rcnn_r50-syncbn-gcb-r16-c3-c5_fpn_1x_coco",
    "x101_gc": "gcnet/mask-rcnn_x101-32x4d-syncbn-gcb-r4-c3-c5_fpn_1x_coco",
    "libra": "libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco",
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


@functools.cache
def theirs_and_ours(name):
    theirs = Detector(DETECTORS[name], picture())
    return theirs, *build(convert(theirs.checkpoint()))


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


REFUSED = {
    "type='MaskRCNN'": ("type='CascadeRCNN'", "model.type is 'CascadeRCNN'"),
    "type='ResNet'": ("type='HRNet'", "model.backbone.type is 'HRNet'"),
    "depth=50": ("depth=50, dcn=dict(type='DCN')", "model.backbone.dcn is {'type': 'DCN'}"),
    "num_stages=4": ("num_stages=3", "model.backbone.num_stages is 3"),
    "norm_eval=True": ("norm_eval=True, new_key=1", "model.backbone.new_key is 1"),
    "type='FPN'": ("type='PAFPN'", "model.neck.type is 'PAFPN'"),
    "type='RPNHead'": ("type='GARPNHead'", "model.rpn_head.type is 'GARPNHead'"),
    "type='FCNMaskHead'": ("type='GridHead'", "model.roi_head.mask_head.type is 'GridHead'"),
    "type='RoIAlign'": ("type='RoIPool'", "roi_layer.type is 'RoIPool'"),
    "min_bbox_size=0": ("min_bbox_size=1", "model.test_cfg.rpn.min_bbox_size is 1"),
    "mask_thr_binary=0.5": ("mask_thr_binary=0.4", "test_cfg.rcnn.mask_thr_binary is 0.4"),
    "type='nms'": ("type='soft_nms'", "nms.type is 'soft_nms'"),
    "norm_cfg=dict(requires_grad=True, type='BN')": (
        "norm_cfg=dict(requires_grad=True, type='SyncABN')",
        "model.backbone.norm_cfg.type is 'SyncABN'",
    ),
}


@pytest.mark.parametrize("old", REFUSED)
def test_what_detectron2_does_not_compute_is_refused_by_name(old):
    text = read_config(DETECTORS["mask_rcnn"]).pretty_text
    assert old in text
    new, message = REFUSED[old]
    with pytest.raises(ConversionError) as error:
        read_detector(read_python_config(text.replace(old, new)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


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


# What 1.x calls the same detector: its own names of keys, and the background first.
CONFIG_1X = """
conv = dict(type='BN', requires_grad=True)
model = dict(
    type='MaskRCNN', pretrained='modelzoo://resnet50',
    backbone=dict(type='ResNet', depth=50, num_stages=4, out_indices=(0, 1, 2, 3),
                  frozen_stages=1, style='pytorch', norm_cfg=conv,
                  gcb=dict(ratio=1./4.), stage_with_gcb=(False, True, True, True)),
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
    rpn_head=dict(type='RPNHead', in_channels=256, feat_channels=256, anchor_scales=[8],
                  anchor_ratios=[0.5, 1.0, 2.0], anchor_strides=[4, 8, 16, 32, 64],
                  target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0]),
    bbox_roi_extractor=dict(type='SingleRoIExtractor', out_channels=256,
                            roi_layer=dict(type='RoIAlign', out_size=7, sample_num=2),
                            featmap_strides=[4, 8, 16, 32]),
    bbox_head=dict(type='SharedFCBBoxHead', num_fcs=2, in_channels=256, fc_out_channels=1024,
                   roi_feat_size=7, num_classes=81, target_means=[0., 0., 0., 0.],
                   target_stds=[0.1, 0.1, 0.2, 0.2], reg_class_agnostic=False),
    mask_roi_extractor=dict(type='SingleRoIExtractor', out_channels=256,
                            roi_layer=dict(type='RoIAlign', out_size=14, sample_num=2),
                            featmap_strides=[4, 8, 16, 32]),
    mask_head=dict(type='FCNMaskHead', num_convs=4, in_channels=256, conv_out_channels=256,
                   num_classes=81))
test_cfg = dict(
    rpn=dict(nms_across_levels=False, nms_pre=1000, nms_post=1000, max_num=1000, nms_thr=0.7,
             min_bbox_size=0),
    rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_thr=0.5), max_per_img=100,
              mask_thr_binary=0.5))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""


def test_a_detector_of_1x_is_the_one_of_2x():
    theirs, conversion, _, _ = theirs_and_ours("gc_r4")
    tensors = {}
    for name, tensor in theirs.model.state_dict().items():
        if ".fc_cls." in name:
            tensor = torch.cat([tensor[-1:], tensor[:-1]])
        elif ".fc_reg." in name:
            tensor = torch.cat([tensor[:4] + 1, tensor])
        elif ".conv_logits." in name:
            tensor = torch.cat([tensor[:1] + 1, tensor])
        tensors[name.removeprefix("roi_head.")] = tensor
    old = convert({"meta": {"config": CONFIG_1X}, "state_dict": tensors})
    assert old.state_dict.keys() == conversion.state_dict.keys()
    for name, tensor in old.state_dict.items():
        assert torch.equal(tensor, conversion.state_dict[name]), name
    settings = [config_of(c.settings) for c in (old, conversion)]
    for cfg in settings:
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 800, 1333
    changed = {
        "ANCHOR_GENERATOR.OFFSET": (0.5, 0.0),
        "ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlign", "ROIAlignV2"),
        "ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": (2, 0),
        "ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlign", "ROIAlignV2"),
        "ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": (2, 0),
    }
    for key, values in changed.items():
        node, leaf = key.split(".")
        assert tuple(cfg.MODEL[node][leaf] for cfg in settings) == values
        settings[0].MODEL[node][leaf] = settings[1].MODEL[node][leaf]
    assert settings[0] == settings[1]
    assert any("1.x rounds its anchors" in note for note in old.notes)
    for line, message in [
        ("stage_with_gcb=[[], [], [-2], []]", "between the sum and the last ReLU"),
        ("stage_with_gcb=(False, True, True, True), dcn=dict(type='x')", "model.backbone.dcn is"),
    ]:
        text = CONFIG_1X.replace("stage_with_gcb=(False, True, True, True)", line)
        with pytest.raises(ConversionError, match=message):
            convert({"meta": {"config": text}, "state_dict": tensors})


def test_other_classes():
    theirs = Detector(
        DETECTORS["mask_rcnn"],
        picture(),
        roi_head={"bbox_head": {"num_classes": 3}, "mask_head": {"num_classes": 3}},
    )
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
