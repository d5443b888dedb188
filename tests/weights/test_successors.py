"""Blocks of the successors: what computes the same converts, the rest is refused."""

import pytest
import torch

from nl_detectron import GlobalContextBlock, NonLocalBlock
from nl_detectron.weights import ConversionError, convert
from tests.layers import peers
from tests.weights.blocks import check_equal, our_block, random_input, randomize

CHANNELS = 64
PLACE = "backbone.layer3.4"


def context_block(**options):
    module = pytest.importorskip("mmcv.cnn.bricks.context_block")
    return randomize(module.ContextBlock(CHANNELS, **{"ratio": 1 / 4, **options}))


def our_context_block(conversion, prefix="", dims=2):
    node = conversion.settings["MODEL"]["NONLOCAL"]
    assert node.pop("BLOCK") == "GlobalContextBlock"
    node.pop("AFTER_BLOCKS_PER_STAGE", None)
    options = {key.lower(): value for key, value in node.items()}
    block = GlobalContextBlock(CHANNELS, dims=dims, **options)
    tensors = {name[len(prefix) :]: t for name, t in conversion.state_dict.items()}
    block.load_state_dict(tensors)
    return block.eval()


@pytest.mark.parametrize("ratio", [1 / 2, 1 / 4, 1 / 16])
@pytest.mark.parametrize("pooling_type", ["att", "avg"])
def test_context_block_of_mmcv_and_gcnet(ratio, pooling_type):
    theirs = context_block(ratio=ratio, pooling_type=pooling_type)
    result = convert(theirs.state_dict())
    assert result.family == "gcnet"
    assert result.settings["MODEL"]["NONLOCAL"]["REDUCTION"] == round(1 / ratio)
    check_equal(our_context_block(result), theirs, random_input(2, CHANNELS))
    assert ("it averages" in result.table()) == (pooling_type == "avg")


def test_context_block_within_a_residual_branch():
    prefix = f"{PLACE}.context_block"
    tensors = {f"{prefix}.{name}": t for name, t in context_block().state_dict().items()}
    tensors[f"{PLACE}.conv1.weight"] = torch.zeros(1)
    with pytest.raises(ConversionError, match=r"context_block is within a residual block's branch"):
        convert({"state_dict": tensors, "meta": {}})
    result = convert(tensors, rename={prefix: "res4.nonlocal4"})
    assert result.notes[0].startswith("NOT THE SAME NETWORK")
    node = result.settings["MODEL"]["NONLOCAL"]
    assert node["AFTER_BLOCKS_PER_STAGE"] == [[], [], [4], []]
    check_equal(
        our_context_block(result, "res4.nonlocal4."), context_block(), random_input(2, CHANNELS)
    )


@pytest.mark.parametrize("fusion_types", [("channel_mul",), ("channel_add", "channel_mul")])
def test_context_that_multiplies_is_refused(fusion_types):
    theirs = context_block(fusion_types=fusion_types)
    with pytest.raises(ConversionError, match=r"channel_mul_conv.* is no part of GCNet's block"):
        convert(theirs.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_add_conv.1.weight": None}, "it has no norm.weight: it is incomplete"),
        ({"channel_add_conv.1.bias": torch.ones(8, 1, 1)}, r"norm.bias has shape \(8,\).*\(16,\)"),
        ({"conv_mask.weight": torch.ones(1, 8, 1, 1)}, r"context has shape \(1, 8, 1, 1\)"),
        ({"channel_add_conv.0.bias": None}, "reduce has no bias: it is incomplete"),
    ],
)
def test_incomplete_context_blocks(change, message):
    tensors = {**context_block().state_dict(), **change}
    with pytest.raises(ConversionError, match=message):
        convert({name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    ("norm", "use_scale", "temperature"),
    [("BN", True, 0.05), ("", False, 0.7), ("GN", True, 0.05)],
)
def test_disentangled_block_of_mmsegmentation(norm, use_scale, temperature):
    dnl_head, _ = peers.mmsegmentation()
    norm_cfg = {"BN": {"type": "BN"}, "GN": {"type": "GN", "num_groups": 32}}.get(norm)
    options = {"mode": "embedded_gaussian", "use_scale": use_scale, "norm_cfg": norm_cfg}
    theirs = dnl_head.DisentangledNonLocal2d(CHANNELS, temperature=temperature, **options)
    randomize(theirs)
    said = {"scale": use_scale}
    if temperature != 0.05:
        said.update(temperature=temperature)
    if norm == "GN":
        said.update(norm=norm)
    state_dict = {f"decode_head.dnl_block.{k}": v for k, v in theirs.state_dict().items()}
    result = convert(state_dict, **said, rename={"decode_head.dnl_block": "res4.nonlocal4"})
    assert result.family == "mmcv"
    node = result.settings["MODEL"]["NONLOCAL"]
    assert (node["PAIRWISE"], node["TEMPERATURE"]) == ("disentangled", temperature)
    assert any("temperature; assumed is 0.05" in note for note in result.notes) == (
        "temperature" not in said
    )
    check_equal(
        our_block(result, prefix="res4.nonlocal4."), theirs.eval(), random_input(2, CHANNELS)
    )
    with pytest.raises(ConversionError, match="mmcv has no pairwise='disentangled'"):
        convert(result.state_dict, "nl_detectron", to="mmcv", **said, subsample="none")


def test_disentangled_block_needs_to_be_told_the_scale():
    dnl_head, _ = peers.mmsegmentation()
    theirs = dnl_head.DisentangledNonLocal2d(CHANNELS, temperature=0.05)
    with pytest.raises(ConversionError, match="does not tell scale=True or False"):
        convert(theirs.state_dict())
    with pytest.raises(ValueError, match="temperature is -1, but must be a number above 0"):
        convert(theirs.state_dict(), scale=True, temperature=-1)


@pytest.mark.parametrize("out", [False, True])
def test_dnls_own_block_is_refused(out):
    """Its names; by default it has no output convolution."""
    shapes = {
        "conv_query": (CHANNELS // 4, CHANNELS),
        "conv_key": (CHANNELS // 4, CHANNELS),
        "conv_value": (CHANNELS // 4 if out else CHANNELS, CHANNELS),
        "conv_mask": (1, CHANNELS),
        **({"conv_out": (CHANNELS, CHANNELS // 4)} if out else {}),
    }
    prefix = f"{PLACE}.nl_gc_block"
    tensors = {f"{prefix}.{n}.weight": torch.zeros(*s, 1, 1) for n, s in shapes.items()}
    tensors[f"{prefix}.gamma"] = torch.zeros(1)
    with pytest.raises(ConversionError, match="gamma multiplies the pairs' term only"):
        convert(tensors, rename={prefix: "res4.nonlocal4"})


def test_anns_blocks_are_refused():
    _, ann_head = peers.mmsegmentation()
    theirs = ann_head.APNB(
        in_channels=CHANNELS,
        channels=16,
        out_channels=CHANNELS,
        query_scales=(1,),
        key_pool_scales=(1, 3, 6, 8),
        conv_cfg=None,
        norm_cfg={"type": "BN"},
        act_cfg={"type": "ReLU"},
    )
    with pytest.raises(ConversionError, match=r"stages.0: ANN's theta and phi end in .* a ReLU"):
        convert(theirs.state_dict())
    names = ("f_key.0", "f_query.0", "f_value", "W")
    own = {f"context.stages.0.{name}.weight": torch.zeros(8, 8, 1, 1) for name in names}
    with pytest.raises(ConversionError, match="concatenated to x, not added"):
        convert(own)


@pytest.mark.parametrize("kind", ["context", "disentangled", "pyramid"])
def test_own_blocks_are_copied_and_not_written_for_others(kind):
    block = {
        "context": GlobalContextBlock(8, reduction=2),
        "disentangled": NonLocalBlock(8, pairwise="disentangled"),
        "pyramid": NonLocalBlock(8, subsample="pyramid"),
    }[kind]
    tensors = {f"res4.nonlocal4.{name}": t for name, t in block.state_dict().items()}
    result = convert(tensors)
    assert result.family == "nl_detectron"
    assert set(result.state_dict) == set(tensors)
    said = {
        "context": {},
        "disentangled": {"scale": True, "subsample": "none"},
        "pyramid": {"scale": True, "subsample": "pyramid", "pairwise": "embedded_gaussian"},
    }[kind]
    with pytest.raises(ConversionError, match=r"mmcv has no (pairwise|subsample)="):
        convert(tensors, to="mmcv", **said)
