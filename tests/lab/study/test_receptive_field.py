"""What the studies rest on: without a non-local block, nothing that decides on an object in the
long-range datasets sees its cue, or its partner. Batch norm at inference; in training it mixes all
positions."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from nl_detectron import model_zoo
from nl_detectron.data.toy.long_range import HEIGHT, MIN_GAP, WIDTH

SQUARE_RIGHT = {"long_range": 43, "long_range_match": 42}  # no square at the left reaches further
PROPOSAL = [0.0, 0.0, 68.0, 32.0]  # nor any box of its height that has an IoU of 0.5 with it
LOCAL = [
    ("MODEL.BACKBONE.NAME", "build_resnet_fpn_no_top_block_backbone"),
    ("MODEL.NONLOCAL.BLOCK", "LocalBlock"),
]


@pytest.fixture(params=list(SQUARE_RIGHT))
def dataset(request):
    return request.param


@pytest.fixture
def seen(request, dataset):
    """Which columns of the picture decide on the square."""
    cfg = model_zoo.get_config(dataset)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
    cfg.merge_from_list(request.param)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    image = torch.randn(1, 3, HEIGHT, WIDTH, requires_grad=True)
    outputs = decisions(model, model.backbone(image))
    sum((x * torch.randn_like(x)).sum() for x in outputs).backward()
    return (image.grad != 0).any(0).any(0).any(0)


def decisions(model, features):
    """All that is computed for the square: proposals, class, box, mask, keypoint."""
    objectness, deltas = model.proposal_generator.rpn_head([features["p3"]])
    columns = max(SQUARE_RIGHT.values()) // 8 + 1
    proposals = [x[..., :columns] for x in (*objectness, *deltas)]
    heads, boxes, p3 = model.roi_heads, [Boxes(torch.tensor([PROPOSAL]))], [features["p3"]]
    pooled = heads.box_head(heads.box_pooler(p3, boxes))
    mask = heads.mask_head.layers(heads.mask_pooler(p3, boxes))
    keypoint = heads.keypoint_head.layers(heads.keypoint_pooler(p3, boxes))
    return [*proposals, *heads.box_predictor(pooled), mask, keypoint]


@pytest.mark.parametrize("seen", LOCAL, indirect=True)
def test_local_models_do_not_see_the_far_cue(dataset, seen):
    assert not seen[SQUARE_RIGHT[dataset] + MIN_GAP :].any()
    assert seen[: SQUARE_RIGHT[dataset] + 40].all()  # but whatever is near


@pytest.mark.parametrize("seen", [()], indirect=True)
def test_nonlocal_model_sees_everything(seen):
    assert seen.all()
