"""The configs in configs/: each loads, builds, and says what it stands for."""

from __future__ import annotations

import functools
from pathlib import Path

import detectron2
import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from nl_detectron import GlobalContextBlock, add_nonlocal_config
from nl_detectron.layers import AttentionBlock

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
LEAVES = [name for name in ALL if "/" in name]

MASK = "COCO-InstanceSegmentation/mask_rcnn_"
KEYPOINT = "COCO-Keypoints/keypoint_rcnn_R_101_FPN_"
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_"
ABLATION = "ablations/mask_rcnn_R_50_FPN_nl_"
SUCCESSOR = "successors/mask_rcnn_R_50_FPN_"
BALANCED = "successors/faster_rcnn_R_50_FPN_balanced_1x.yaml"

# Tables 5 and 6 of the paper, AP / AP50 / AP75.
PAPER = {
    f"{MASK}R_50_FPN_1x.yaml": "box 38.0 / 59.6 / 41.0, mask 34.6 / 56.4 / 36.5",
    f"{MASK}R_50_FPN_nl_1x.yaml": "box 39.0 / 61.1 / 41.9, mask 35.5 / 58.0 / 37.4",
    f"{MASK}R_101_FPN_1x.yaml": "box 39.5 / 61.4 / 42.9, mask 36.0 / 58.1 / 38.3",
    f"{MASK}R_101_FPN_nl_1x.yaml": "box 40.8 / 63.1 / 44.5, mask 37.1 / 59.9 / 39.2",
    f"{MASK}X_152_32x8d_FPN_IN5k_1x.yaml": "box 44.1 / 66.4 / 48.4, mask 39.7 / 63.2 / 42.2",
    f"{MASK}X_152_32x8d_FPN_IN5k_nl_1x.yaml": "box 45.0 / 67.8 / 48.9, mask 40.3 / 64.4 / 42.8",
    f"{KEYPOINT}1x.yaml": "keypoint 65.1 / 86.8 / 70.4",
    f"{KEYPOINT}nl_head_1x.yaml": "keypoint 66.0 / 87.1 / 71.7",
    f"{KEYPOINT}nl_head_backbone_1x.yaml": "keypoint 66.5 / 87.3 / 72.8",
}

HEAD_BLOCKS = [f"roi_heads.keypoint_head.nonlocal{n}" for n in (2, 4, 6, 8)]
RES5 = [f"res5.nonlocal{n}" for n in range(3)]
RES3_TO_5 = [
    *(f"res3.nonlocal{n}" for n in range(4)),
    *(f"res4.nonlocal{n}" for n in range(6)),
    *RES5,
]
# The non-local blocks in each config, below backbone.bottom_up where not said otherwise.
BLOCKS = {
    f"{FASTER}1x.yaml": [],
    f"{FASTER}nl_1x.yaml": ["res4.nonlocal4"],
    f"{MASK}R_50_FPN_1x.yaml": [],
    f"{MASK}R_50_FPN_nl_1x.yaml": ["res4.nonlocal4"],
    f"{MASK}R_101_FPN_1x.yaml": [],
    f"{MASK}R_101_FPN_nl_1x.yaml": ["res4.nonlocal21"],
    f"{MASK}X_152_32x8d_FPN_IN5k_1x.yaml": [],
    f"{MASK}X_152_32x8d_FPN_IN5k_nl_1x.yaml": ["res4.nonlocal34"],
    f"{KEYPOINT}1x.yaml": [],
    f"{KEYPOINT}nl_head_1x.yaml": HEAD_BLOCKS,
    f"{KEYPOINT}nl_head_backbone_1x.yaml": ["res4.nonlocal21", *HEAD_BLOCKS],
    f"{ABLATION}gaussian_1x.yaml": ["res4.nonlocal4"],
    f"{ABLATION}dot_product_1x.yaml": ["res4.nonlocal4"],
    f"{ABLATION}concatenation_1x.yaml": ["res4.nonlocal4"],
    f"{ABLATION}no_subsample_1x.yaml": ["res4.nonlocal4"],
    f"{ABLATION}subsample_input_1x.yaml": ["res4.nonlocal4"],
    f"{ABLATION}no_scale_1x.yaml": ["res4.nonlocal4"],
    f"{ABLATION}res2_1x.yaml": ["res2.nonlocal1"],
    f"{ABLATION}res3_1x.yaml": ["res3.nonlocal2"],
    f"{ABLATION}res5_1x.yaml": ["res5.nonlocal1"],
    f"{ABLATION}5_blocks_1x.yaml": [
        *(f"res3.nonlocal{n}" for n in (1, 3)),
        *(f"res4.nonlocal{n}" for n in (1, 3, 5)),
    ],
    f"{ABLATION}10_blocks_1x.yaml": [
        *(f"res3.nonlocal{n}" for n in range(4)),
        *(f"res4.nonlocal{n}" for n in range(6)),
    ],
    f"{SUCCESSOR}gc_r16_1x.yaml": RES3_TO_5,
    f"{SUCCESSOR}gc_r4_1x.yaml": RES3_TO_5,
    f"{SUCCESSOR}gc_r4_conv3_1x.yaml": [
        f"res{stage}.{block}.conv3.nonlocal"
        for stage, blocks in ((3, 4), (4, 6), (5, 3))
        for block in range(blocks)
    ],
    BALANCED: ["backbone.nonlocal.refine"],
    f"{SUCCESSOR}dnl_1x.yaml": ["res4.nonlocal4"],
    f"{SUCCESSOR}dnl_c4_c5_1x.yaml": ["res4.nonlocal4", *RES5],
    f"{SUCCESSOR}pyramid_1x.yaml": ["res4.nonlocal4"],
}

# What sets each config with blocks apart from its baseline.
BACKBONE, HEAD = "MODEL.BACKBONE.NAME", "MODEL.ROI_KEYPOINT_HEAD.NAME"
AFTER_BLOCKS = "MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE"
REDUCTION, SUBSAMPLE = "MODEL.NONLOCAL.REDUCTION", "MODEL.NONLOCAL.SUBSAMPLE"
CONTEXT = {BACKBONE, AFTER_BLOCKS, REDUCTION, "MODEL.NONLOCAL.BLOCK"}
DISENTANGLED = {BACKBONE, REDUCTION, SUBSAMPLE, "MODEL.NONLOCAL.PAIRWISE"}
CHANGED = {
    f"{SUCCESSOR}gc_r16_1x.yaml": CONTEXT,
    f"{SUCCESSOR}gc_r4_1x.yaml": CONTEXT,
    f"{SUCCESSOR}gc_r4_conv3_1x.yaml": {*CONTEXT, "MODEL.NONLOCAL.AFTER_MODULES"},
    BALANCED: {BACKBONE, REDUCTION, SUBSAMPLE, "MODEL.NONLOCAL.SCALE", "MODEL.NONLOCAL.NORM"},
    f"{SUCCESSOR}dnl_1x.yaml": DISENTANGLED,
    f"{SUCCESSOR}dnl_c4_c5_1x.yaml": {*DISENTANGLED, AFTER_BLOCKS},
    f"{SUCCESSOR}pyramid_1x.yaml": {BACKBONE, SUBSAMPLE},
    f"{KEYPOINT}nl_head_1x.yaml": {HEAD},
    f"{KEYPOINT}nl_head_backbone_1x.yaml": {BACKBONE, HEAD},
    f"{ABLATION}gaussian_1x.yaml": {BACKBONE, "MODEL.NONLOCAL.PAIRWISE"},
    f"{ABLATION}dot_product_1x.yaml": {BACKBONE, "MODEL.NONLOCAL.PAIRWISE"},
    f"{ABLATION}concatenation_1x.yaml": {BACKBONE, "MODEL.NONLOCAL.PAIRWISE"},
    f"{ABLATION}no_subsample_1x.yaml": {BACKBONE, "MODEL.NONLOCAL.SUBSAMPLE"},
    f"{ABLATION}subsample_input_1x.yaml": {BACKBONE, "MODEL.NONLOCAL.SUBSAMPLE"},
    f"{ABLATION}no_scale_1x.yaml": {BACKBONE, "MODEL.NONLOCAL.SCALE"},
    # A block in a frozen stage is frozen with it, so res2 must not be.
    f"{ABLATION}res2_1x.yaml": {BACKBONE, AFTER_BLOCKS, "MODEL.BACKBONE.FREEZE_AT"},
    f"{ABLATION}res3_1x.yaml": {BACKBONE, AFTER_BLOCKS},
    f"{ABLATION}res5_1x.yaml": {BACKBONE, AFTER_BLOCKS},
    f"{ABLATION}5_blocks_1x.yaml": {BACKBONE, AFTER_BLOCKS},
    f"{ABLATION}10_blocks_1x.yaml": {BACKBONE, AFTER_BLOCKS},
}
WITH_BLOCKS = sorted(name for name, blocks in BLOCKS.items() if blocks)

# Detectron2's own config for a baseline, and the keys in which the two differ.
NO_JITTER = "INPUT.MIN_SIZE_TRAIN"
NO_MASK = "MODEL.ROI_MASK_HEAD.NUM_CONV"  # set by Detectron2 where there is no mask head, too
ZOO = {
    f"{FASTER}1x.yaml": (f"{FASTER}1x.yaml", {NO_JITTER, NO_MASK}),
    f"{MASK}R_50_FPN_1x.yaml": (f"{MASK}R_50_FPN_1x.yaml", {NO_JITTER}),
    f"{MASK}R_101_FPN_1x.yaml": (
        f"{MASK}R_101_FPN_3x.yaml",
        {NO_JITTER, "SOLVER.MAX_ITER", "SOLVER.STEPS"},
    ),
    f"{KEYPOINT}1x.yaml": (
        f"{KEYPOINT}3x.yaml",
        {NO_MASK, "SOLVER.MAX_ITER", "SOLVER.STEPS"},
    ),
}


def load(path: str | Path | None) -> CfgNode:
    """The config in ``path`` (relative to configs/), or the defaults if there is none."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    if path is not None:
        cfg.merge_from_file(str(CONFIGS / path), allow_unsafe=False)
    return cfg


def own_lines(name: str) -> dict:
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


def base_of(name: str) -> str | None:
    base = own_lines(name).get("_BASE_")
    if base is None:
        return None
    return (CONFIGS / name).parent.joinpath(base).resolve().relative_to(CONFIGS).as_posix()


def baseline_of(name: str) -> str:
    """The nearest config in the chain of bases that has no blocks."""
    cfg = load(name)
    ours = ("build_nonlocal_backbone", "build_balanced_fpn_backbone")
    while cfg.MODEL.BACKBONE.NAME in ours or "NonLocal" in cfg.MODEL.ROI_KEYPOINT_HEAD.NAME:
        name = base_of(name)
        cfg = load(name)
    return name


def flatten(node: dict, prefix: str = "") -> dict:
    """``{"A": {"B": 1}}`` to ``{"A.B": 1}``."""
    flat = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differing_keys(one: CfgNode, other: CfgNode) -> set[str]:
    one, other = flatten(one), flatten(other)
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def first_comment(name: str) -> str:
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


@functools.cache
def build(name: str) -> nn.Module:
    """The model, without memory for its parameters."""
    cfg = load(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def nonlocal_blocks(model: nn.Module) -> dict[str, AttentionBlock]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AttentionBlock)}


def test_the_tables_of_this_file_name_every_config_there_is():
    assert sorted(BLOCKS) == LEAVES
    assert set(CHANGED) <= set(WITH_BLOCKS)
    assert set(PAPER) <= set(LEAVES)


@pytest.mark.parametrize("name", ALL)
def test_builds(name):
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("name", ALL)
def test_holds_only_what_differs_from_its_base(name):
    own = own_lines(name)
    base = own.pop("_BASE_", None)
    if base is None:
        # Without it Detectron2 guesses, and warns.
        assert own.pop("VERSION") == 2
    before = flatten(load(base_of(name)))
    after = flatten(load(name))
    repeated = [key for key in flatten(own) if before[key] == after[key]]
    assert not repeated, f"{name} repeats what it has from {base or 'the defaults'}: {repeated}"


@pytest.mark.parametrize("name", LEAVES)
def test_chain_of_bases_stays_within_the_folder(name):
    chain = [name]
    while (base := base_of(chain[-1])) is not None:
        chain.append(base)
    assert chain[-1] == "Base-RCNN-FPN.yaml"


@pytest.mark.parametrize("name", LEAVES)
def test_has_weights_that_fit_its_stride(name):
    cfg = load(name)
    assert "ImageNetPretrained/" in cfg.MODEL.WEIGHTS
    depth = cfg.MODEL.RESNETS.DEPTH
    assert f"-{depth}" in cfg.MODEL.WEIGHTS
    # The original ResNets have the stride in the first 1x1 convolution, FAIR's have not.
    assert ("/MSRA/" in cfg.MODEL.WEIGHTS) == cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN"


@pytest.mark.parametrize("name", LEAVES)
def test_says_what_it_is(name):
    comment = first_comment(name)
    assert comment
    assert ("Paper (AP" in comment) == (name in PAPER)
    if name in PAPER:
        assert f"# Paper (AP / AP50 / AP75): {PAPER[name]}.\n" in comment
        assert comment.startswith(f"# Table {6 if 'Keypoints' in name else 5}, ")


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_has_the_blocks(name):
    expected = [
        block if block.startswith(("roi_heads.", "backbone.")) else f"backbone.bottom_up.{block}"
        for block in BLOCKS[name]
    ]
    assert list(nonlocal_blocks(build(name))) == expected


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_every_block_learns(name):
    for block in nonlocal_blocks(build(name)).values():
        assert all(p.requires_grad for p in block.parameters())
        if name == BALANCED:
            assert block.norm is None
            continue
        is_context = isinstance(block, GlobalContextBlock)
        assert isinstance(block.norm, nn.LayerNorm if is_context else nn.BatchNorm2d)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_follow_the_config(name):
    node = load(name).MODEL.NONLOCAL
    for block in nonlocal_blocks(build(name)).values():
        assert type(block).__name__ == node.BLOCK
        inner = block.reduce if node.BLOCK == "GlobalContextBlock" else block.g
        assert inner.out_channels == block.in_channels // node.REDUCTION
        if node.BLOCK == "GlobalContextBlock":
            continue
        assert block.pairwise == node.PAIRWISE
        assert block.subsample == node.SUBSAMPLE
        assert (block.logit_scale == 1) == (not node.SCALE)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_other_parameters_are_the_baselines(name):
    shapes = {key: value.shape for key, value in build(name).state_dict().items()}
    blocks = tuple(f"{block}." for block in nonlocal_blocks(build(name)))
    others = {key: shape for key, shape in shapes.items() if not key.startswith(blocks)}
    baseline = build(baseline_of(name)).state_dict()
    assert others == {key: value.shape for key, value in baseline.items()}


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_differs_from_its_baseline_only_in_the_blocks(name):
    changed = differing_keys(load(name), load(baseline_of(name)))
    assert changed == CHANGED.get(name, {BACKBONE})


@pytest.mark.parametrize("name", sorted(ZOO))
def test_baseline_is_detectron2s(name):
    zoo_name, differing = ZOO[name]
    package = Path(detectron2.__file__).parent
    # Installed inside the package, or beside it in a clone.
    folders = [package / "model_zoo" / "configs", package.parent / "configs"]
    paths = [folder / zoo_name for folder in folders if (folder / zoo_name).is_file()]
    if not paths:
        pytest.skip("this Detectron2 was installed without its configs")
    assert differing_keys(load(name), load(paths[0])) == differing


@pytest.mark.parametrize("prefix", [ABLATION, SUCCESSOR])
def test_readme_of_a_folder_names_each_of_its_configs(prefix):
    folder = prefix.partition("/")[0]
    text = (CONFIGS / folder / "README.md").read_text(encoding="utf-8")
    names = [name for name in LEAVES if name.startswith(f"{folder}/")]
    assert names
    for name in names:
        assert f"`{name.removeprefix(prefix).removeprefix(f'{folder}/')}`" in text


def test_readme_of_the_ablations_has_a_default_in_each_group():
    text = (CONFIGS / "ablations" / "README.md").read_text(encoding="utf-8")
    # The one row that is left in each of the five groups is the default.
    assert text.count("| *default* |") == 5
