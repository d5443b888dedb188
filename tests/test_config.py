import pytest
from detectron2.config import get_cfg

from nl_detectron import add_nonlocal_config
from nl_detectron.modeling import build_block


def config():
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    return cfg


def test_defaults_are_the_papers_block():
    node = config().MODEL.NONLOCAL
    assert dict(node) == {
        "BACKBONE": "build_resnet_fpn_backbone",
        "AFTER_BLOCKS_PER_STAGE": [[], [], [-2], []],
        "BLOCK": "NonLocalBlock",
        "PAIRWISE": "embedded_gaussian",
        "REDUCTION": 2,
        "SCALE": True,
        "TEMPERATURE": 0.05,
        "SUBSAMPLE": "embeddings",
        "NORM": "BN",
        "ZERO_INIT": True,
        "ZERO_INIT_LAYER": "norm",
        "GAMMA_LR_FACTOR": 1.0,
        "LR_FACTOR": 1.0,
        "USE_ACT_CHECKPOINT": False,
        "KEYPOINT_HEAD_EVERY": 2,
    }


def test_nothing_else_changes():
    cfg = config()
    del cfg.MODEL["NONLOCAL"]
    assert cfg.SOLVER.pop("CHECKPOINT_KEEP_LAST") == 0
    assert cfg.TEST.pop("BEST_CHECKPOINT_METRIC") == ""
    assert cfg == get_cfg()


def test_the_config_makes_a_block():
    block = build_block(config(), 64)
    assert (block.pairwise, block.subsample, block.g.out_channels) == (
        "embedded_gaussian",
        "embeddings",
        32,
    )


def test_a_block_needs_the_node():
    with pytest.raises(ValueError, match=r"call add_nonlocal_config\(cfg\) first"):
        build_block(get_cfg(), 64)


def test_a_block_refuses_a_temperature():
    cfg = config()
    cfg.MODEL.NONLOCAL.TEMPERATURE = -1.0
    with pytest.raises(ValueError, match=r"MODEL.NONLOCAL.TEMPERATURE is -1.0, .* above 0"):
        build_block(cfg, 64)


@pytest.mark.parametrize("key", ["BLOCK", "PAIRWISE", "SUBSAMPLE", "NORM", "ZERO_INIT_LAYER"])
def test_a_block_refuses(key):
    cfg = config()
    cfg.MODEL.NONLOCAL[key] = "nothing of the sort"
    with pytest.raises(ValueError, match=f"MODEL.NONLOCAL.{key} is 'nothing of the sort'"):
        build_block(cfg, 64)
