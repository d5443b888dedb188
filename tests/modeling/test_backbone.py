import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from nl_detectron import NonLocalBlock, add_nonlocal_config

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
AFTER_BLOCKS = "MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE"
# Of the channels a quarter or less: res4 has 256.
NARROW = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 16),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [32, 32]),
]


def zoo_config(name, *overrides):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([*NARROW, *overrides])
    return cfg


def with_blocks(cfg, *overrides):
    """The three lines of the README."""
    cfg = cfg.clone()
    cfg.MODEL.NONLOCAL.BACKBONE = cfg.MODEL.BACKBONE.NAME
    cfg.MODEL.BACKBONE.NAME = "build_nonlocal_backbone"
    cfg.merge_from_list(list(overrides))
    return cfg


def nonlocal_blocks(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, NonLocalBlock)}


def images(height=64, width=96):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return [{"image": image, "height": height, "width": width}]


OTHER_PROJECTS = [
    MASK,
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
]


@pytest.mark.parametrize("name", OTHER_PROJECTS)
def test_in_detectron2s_own_models_nothing_changes_at_first(name):
    """Same weights, blocks at zero init: bit for bit the same predictions."""
    # A threshold of 0 lets untrained models predict something.
    cfg = zoo_config(
        name,
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
        *("TEST.DETECTIONS_PER_IMAGE", 3, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    )
    torch.manual_seed(0)
    plain = build_model(cfg).eval()
    for key, buffer in plain.named_buffers():
        if key.endswith("conv3.norm.weight"):  # else features grow from block to block
            buffer.fill_(0.2)
    modified = build_model(with_blocks(cfg)).eval()
    missing, unexpected = modified.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".res4.nonlocal4." in key for key in missing)
    assert len(nonlocal_blocks(modified)) == 1
    with torch.no_grad():
        expected, actual = plain(images())[0], modified(images())[0]
    for kind, predicted in expected.items():
        if kind == "instances":
            assert len(predicted) > 0
            for field, value in predicted.get_fields().items():
                value = value.tensor if isinstance(value, Boxes) else value
                other = actual[kind].get(field)
                other = other.tensor if isinstance(other, Boxes) else other
                assert torch.equal(value, other), field
        elif kind == "sem_seg":
            assert torch.equal(predicted, actual[kind])


def annotated(sizes=((64, 96), (96, 64))):
    torch.manual_seed(1)
    inputs = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 4.0, 60.0, 50.0]]))
        instances.gt_classes = torch.tensor([0, 0])
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 8:40, 8:40] = masks[1, 4:50, 20:60] = True
        instances.gt_masks = BitMasks(masks)
        keypoints = torch.rand(2, 17, 3) * 30 + 20
        keypoints[..., 2] = 2
        instances.gt_keypoints = Keypoints(keypoints)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


@pytest.mark.parametrize("name", [MASK, "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"])
def test_training_losses_are_the_plain_models_at_first_and_reach_the_block(name):
    overrides = ["INPUT.MASK_FORMAT", "bitmask", "MODEL.RESNETS.DEPTH", 50]
    cfg = zoo_config(name, *overrides)
    torch.manual_seed(0)
    plain = build_model(cfg)
    modified = build_model(with_blocks(cfg))
    modified.load_state_dict(plain.state_dict(), strict=False)
    losses = []
    with EventStorage():
        for model in (plain, modified):
            torch.manual_seed(2)  # of the sampling of proposals
            losses.append(model.train()(annotated()))
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[0].items():
        assert torch.equal(value, losses[1][key]), key
    sum(losses[1].values()).backward()
    (block,) = nonlocal_blocks(modified).values()
    assert block.norm.weight.grad.any()


def test_more_blocks_from_the_config():
    cfg = with_blocks(zoo_config(MASK), AFTER_BLOCKS, [[], [1, 3], [1, 3, 5], []])
    blocks = nonlocal_blocks(build_model(cfg))
    assert [name.removeprefix("backbone.bottom_up.") for name in blocks] == [
        "res3.nonlocal1",
        "res3.nonlocal3",
        "res4.nonlocal1",
        "res4.nonlocal3",
        "res4.nonlocal5",
    ]


def test_options_from_the_config():
    cfg = with_blocks(
        zoo_config(MASK),
        *("MODEL.NONLOCAL.PAIRWISE", "gaussian", "MODEL.NONLOCAL.REDUCTION", 4),
        *("MODEL.NONLOCAL.SCALE", False, "MODEL.NONLOCAL.SUBSAMPLE", "input"),
        *("MODEL.NONLOCAL.NORM", "", "MODEL.NONLOCAL.ZERO_INIT", False),
    )
    (block,) = nonlocal_blocks(build_model(cfg)).values()
    assert (block.pairwise, block.subsample, block.norm) == ("gaussian", "input", None)
    assert (block.theta, block.g.out_channels, block.logit_scale) == (None, 64, 1.0)
    assert block.out.weight.any()


def test_no_blocks_is_the_wrapped_backbone():
    cfg = with_blocks(zoo_config(MASK), AFTER_BLOCKS, [[], [], [], []])
    assert not nonlocal_blocks(build_model(cfg))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("PAIRWISE", "softmax", "MODEL.NONLOCAL.PAIRWISE is 'softmax'.*'embedded_gaussian'"),
        ("SUBSAMPLE", "embedding", "MODEL.NONLOCAL.SUBSAMPLE.*did you mean 'embeddings'"),
        ("NORM", "bn", "MODEL.NONLOCAL.NORM is 'bn'.*'BN'"),
        ("REDUCTION", 0, "MODEL.NONLOCAL.REDUCTION is 0"),
        ("REDUCTION", 2000, "MODEL.NONLOCAL.REDUCTION is 2000.*in_channels=256"),
        ("BACKBONE", "build_resnet_fpn", "MODEL.NONLOCAL.BACKBONE.*'build_resnet_fpn_backbone'"),
        ("BACKBONE", "build_nonlocal_backbone", "MODEL.NONLOCAL.BACKBONE is"),
        ("AFTER_BLOCKS_PER_STAGE", [[], [], [6], []], "AFTER_BLOCKS_PER_STAGE.*6 in res4.*-6 to 5"),
        ("AFTER_BLOCKS_PER_STAGE", [[], [], [0, 0], []], "AFTER_BLOCKS_PER_STAGE.*already"),
        ("AFTER_BLOCKS_PER_STAGE", [[], [], [], [], [0]], "stage number 5.*res2, res3, res4, res5"),
        ("AFTER_BLOCKS_PER_STAGE", [-2], r"res2 is given -2, .* list .* indices, such as \[-2\]"),
    ],
)
def test_refuses(key, value, message):
    cfg = with_blocks(zoo_config(MASK))
    cfg.MODEL.NONLOCAL[key] = value
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_refuses_the_default_place_in_a_trident_net(monkeypatch):
    monkeypatch.setattr(BottleneckBlock, "concat_output", False, raising=False)
    place = (
        r"AFTER_BLOCKS_PER_STAGE is \[\[\], \[\], \[-2\], \[\]\], a list of .* of "
        "build_resnet_fpn_backbone: block index -2 in res4: a BottleneckBlock gives a list of "
        r"tensors.*; put the block after the last one of res4 \(index -1\), or into another stage$"
    )
    with pytest.raises(ValueError, match=place):
        build_model(with_blocks(zoo_config(MASK)))


def test_refuses_a_stage_that_c4_does_not_have():
    cfg = with_blocks(
        zoo_config("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"),
        *(AFTER_BLOCKS, [[], [], [], [0]]),
    )
    with pytest.raises(ValueError, match=r"stage number 4.*res2, res3, res4"):
        build_model(cfg)
