import pytest
from detectron2.config import get_cfg

from nl_detectron import add_nonlocal_config
from nl_detectron.config import block_options
from nl_detectron.layers import NonLocalBlock


def config():
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    return cfg


def test_defaults_are_the_papers_block():
    node = config().MODEL.NONLOCAL
    assert dict(node) == {
        "BACKBONE": "build_resnet_fpn_backbone",
        "AFTER_BLOCKS_PER_STAGE": [[], [], [-2], []],
        "PAIRWISE": "embedded_gaussian",
        "REDUCTION": 2,
        "SCALE": True,
        "SUBSAMPLE": "embeddings",
        "NORM": "BN",
        "ZERO_INIT": True,
        "ZERO_INIT_LAYER": "norm",
        "USE_ACT_CHECKPOINT": False,
        "KEYPOINT_HEAD_EVERY": 2,
    }


def test_nothing_else_changes():
    cfg = config()
    del cfg.MODEL["NONLOCAL"]
    assert cfg.SOLVER.pop("CHECKPOINT_KEEP_LAST") == 0
    assert cfg == get_cfg()


def test_block_options_make_a_block():
    block = NonLocalBlock(64, **block_options(config()))
    assert (block.pairwise, block.subsample, block.g.out_channels) == (
        "embedded_gaussian",
        "embeddings",
        32,
    )


def test_block_options_need_the_node():
    with pytest.raises(ValueError, match=r"call add_nonlocal_config\(cfg\) first"):
        block_options(get_cfg())


@pytest.mark.parametrize("key", ["PAIRWISE", "SUBSAMPLE", "NORM"])
def test_block_options_refuse(key):
    cfg = config()
    cfg.MODEL.NONLOCAL[key] = "nothing of the sort"
    with pytest.raises(ValueError, match=f"MODEL.NONLOCAL.{key} is 'nothing of the sort'"):
        block_options(cfg)
