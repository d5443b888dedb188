"""Whole detectors, compared with mmdetection's own code."""

import functools

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from nl_detectron import add_nonlocal_config
from nl_detectron.weights import convert
from tests.weights.mmdet_peer import Detector, is_installed

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
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(conversion.settings))
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
