import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_keypoint_head
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from nl_detectron import add_nonlocal_config

CHANNELS, KEYPOINTS = 16, 3


def build(name="NonLocalKeypointHead", every=2, convs=8, **nonlocal_options):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = name
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [32] * convs
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = KEYPOINTS
    cfg.MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY = every
    for key, value in nonlocal_options.items():
        cfg.MODEL.NONLOCAL[key] = value
    torch.manual_seed(0)
    return build_keypoint_head(cfg, ShapeSpec(channels=CHANNELS, height=14, width=14))


def regions(count, training):
    instances = Instances((100, 100))
    boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 60.0]]).repeat(count, 1))
    if training:
        instances.proposal_boxes = boxes
        keypoints = torch.full((count, KEYPOINTS, 3), 30.0)
        keypoints[..., 2] = 2
        instances.gt_keypoints = Keypoints(keypoints)
    else:
        instances.pred_boxes = boxes
    return torch.randn(count, CHANNELS, 14, 14), [instances]


def test_a_block_after_every_two_convolutions():
    names = [name for name, _ in build().named_children()]
    assert names[:8] == [
        "conv_fcn1", "conv_fcn_relu1", "conv_fcn2", "conv_fcn_relu2", "nonlocal2",
        "conv_fcn3", "conv_fcn_relu3", "conv_fcn4",
    ]  # fmt: skip
    assert [n for n in names if "nonlocal" in n] == [f"nonlocal{i}" for i in (2, 4, 6, 8)]
    assert names[-1] == "score_lowres"


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [1, 2, 3, 4]), (3, [3]), (4, [4])])
def test_every(every, expected):
    head = build(every=every, convs=4)
    names = [name for name, _ in head.named_children() if "nonlocal" in name]
    assert names == [f"nonlocal{i}" for i in expected]


@pytest.mark.parametrize("every", [-1, 9])
def test_refuses(every):
    with pytest.raises(ValueError, match=f"KEYPOINT_HEAD_EVERY is {every}.*0.*8"):
        build(every=every)


def test_refuses_options_by_name():
    with pytest.raises(ValueError, match=r"MODEL.NONLOCAL.REDUCTION is 40, .*in_channels=32"):
        build(REDUCTION=40)


def test_keeps_names_and_outputs_of_detectron2s_head():
    plain, modified = build("KRCNNConvDeconvUpsampleHead"), build()
    missing, unexpected = modified.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith("nonlocal") for key in missing)
    x, _ = regions(5, training=False)
    assert torch.equal(modified.layers(x), plain.layers(x))


def test_blocks_keep_their_own_initialisation():
    # The parent initialises every parameter that it finds.
    head = build(ZERO_INIT=True, NORM="")
    assert not head.nonlocal4.out.weight.any()
    assert float(head.nonlocal4.theta.weight.detach().std()) == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"BLOCK": "GlobalContextBlock"}, {"PAIRWISE": "disentangled", "SUBSAMPLE": "pyramid"}],
    ids=str,
)
def test_any_number_of_regions(count, training, options):
    head = build(**options).train(training)
    x, instances = regions(count, training)
    with EventStorage():
        result = head(x, instances)
    if training:
        result["loss_keypoint"].backward()
        # Distributed training waits for a gradient of every parameter.
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    else:
        assert result[0].pred_keypoints.shape == (count, KEYPOINTS, 3)
