from pathlib import Path

import pytest
from detectron2.config import get_cfg
from torch import nn

from nl_detectron import NONLOCAL_BLOCK_REGISTRY, add_nonlocal_config, use_nonlocal_backbone
from nl_detectron.config import build_config
from nl_detectron.modeling import build_block

QUICK_START = Path(__file__).resolve().parent.parent / "configs" / "quick_start.yaml"


def config():
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    return cfg


def test_defaults_are_the_papers_block():
    node = config().MODEL.NONLOCAL
    assert dict(node) == {
        "BACKBONE": "build_resnet_fpn_backbone",
        "AFTER_BLOCKS_PER_STAGE": [[], [], [-2], []],
        "AFTER_MODULES": [],
        "BLOCK": "NonLocalBlock",
        "PAIRWISE": "embedded_gaussian",
        "REDUCTION": 2,
        "SCALE": True,
        "TEMPERATURE": 0.05,
        "SUBSAMPLE": "embeddings",
        "NORM": "BN",
        "TIMM": "se",
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
    assert not any(cfg.DATASETS.pop("OWN").values())
    assert cfg.TEST.pop("FAST_EVAL") is False
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


def test_what_is_there_is_kept():
    cfg = config()
    cfg.MODEL.NONLOCAL.PAIRWISE = "gaussian"
    cfg.SOLVER.CHECKPOINT_KEEP_LAST = 3
    del cfg.MODEL.NONLOCAL["NORM"]
    cfg.MODEL.NONLOCAL.OWN = 1
    add_nonlocal_config(cfg)
    node = cfg.MODEL.NONLOCAL
    assert (node.PAIRWISE, node.NORM, node.OWN) == ("gaussian", "BN", 1)
    assert cfg.SOLVER.CHECKPOINT_KEEP_LAST == 3
    cfg.freeze()
    add_nonlocal_config(cfg)  # nothing is missing


@pytest.mark.parametrize("has_node", [True, False])
def test_the_backbone_is_wrapped_once(has_node):
    cfg = config() if has_node else get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    if has_node:
        cfg.MODEL.NONLOCAL.PAIRWISE = "gaussian"
    for _ in range(2):
        use_nonlocal_backbone(cfg)
        assert cfg.MODEL.BACKBONE.NAME == "build_nonlocal_backbone"
        assert cfg.MODEL.NONLOCAL.BACKBONE == "build_retinanet_resnet_fpn_backbone"
        assert (cfg.MODEL.NONLOCAL.PAIRWISE == "gaussian") == has_node
        cfg.freeze()  # the second call has nothing to change


def test_the_balanced_pyramid_is_not_wrapped():
    cfg = config()
    cfg.MODEL.BACKBONE.NAME = "build_balanced_fpn_backbone"
    use_nonlocal_backbone(cfg)
    assert cfg.MODEL.BACKBONE.NAME == "build_balanced_fpn_backbone"
    assert cfg.MODEL.NONLOCAL.BACKBONE == "build_resnet_fpn_backbone"


def test_a_saved_config_is_read_again(tmp_path):
    cfg = get_cfg()
    use_nonlocal_backbone(cfg)
    cfg.MODEL.NONLOCAL.REDUCTION = 4
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = config()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    use_nonlocal_backbone(again)
    for loaded in (again, build_config(tmp_path / "config.yaml")):
        for key in ("NONLOCAL", "BACKBONE"):
            assert loaded.MODEL[key] == cfg.MODEL[key]


@pytest.mark.parametrize("prepare", [get_cfg, config])
def test_a_frozen_config_is_not_wrapped(prepare):
    cfg = prepare()
    cfg.freeze()
    with pytest.raises(ValueError, match=r"frozen: call use_nonlocal_backbone\(cfg\) before"):
        use_nonlocal_backbone(cfg)
    assert cfg == prepare()


def test_only_an_argument_becomes_a_key():
    """A user's block fails with words of its own, which begin as a key does."""

    @NONLOCAL_BLOCK_REGISTRY.register()
    class FailingBlock(nn.Module):
        def __init__(self, cfg, in_channels):
            raise ValueError(f"Block of {in_channels} channels is too wide")

    cfg = config()
    cfg.MODEL.NONLOCAL.BLOCK = "FailingBlock"
    try:
        with pytest.raises(ValueError, match=r"^Block of 64 channels is too wide$"):
            build_block(cfg, 64)
    finally:
        NONLOCAL_BLOCK_REGISTRY._obj_map.pop("FailingBlock")


@pytest.mark.parametrize("value", ["1", 1, "1.0"])
@pytest.mark.parametrize("key", ["SOLVER.BASE_LR", "MODEL.NONLOCAL.GAMMA_LR_FACTOR"])
def test_a_whole_number_is_a_float(value, key, tmp_path):
    file = tmp_path / "config.yaml"
    node, _, leaf = key.rpartition(".")
    lines = [f"{'  ' * i}{name}:" for i, name in enumerate(node.split("."))]
    file.write_text("\n".join([*lines, f"{'  ' * len(lines)}{leaf}: {value}"]))
    for cfg in (build_config(file), build_config(QUICK_START, [key, value])):
        for name in key.split("."):
            cfg = cfg[name]
        assert (type(cfg), cfg) == (float, 1.0)


@pytest.mark.parametrize(
    ("key", "value"), [("SOLVER.MAX_ITER", "1.0"), ("SOLVER.BASE_LR", "True"), ("SEED", "1.5")]
)
def test_other_types_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} is '{value}', of type"):
        build_config(QUICK_START, [key, value])


LAUGHS = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")]
    + ["MODEL: {WEIGHTS: *i}"]
)


@pytest.mark.parametrize("text", [LAUGHS, "_BASE_: bomb.yaml", "MODEL: &a {WEIGHTS: *a}"])
def test_aliases_of_aliases_do_not_take_the_machine(text, tmp_path):
    (tmp_path / "bomb.yaml").write_text(LAUGHS)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml cannot be read as a config: .*aliases"):
        build_config(tmp_path / "config.yaml")


def test_a_few_aliases_are_fine(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("DATASETS: {TRAIN: &d [a, b], TEST: *d}")
    assert build_config(file).DATASETS.TEST == ("a", "b")
