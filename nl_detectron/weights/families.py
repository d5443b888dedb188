"""The implementations whose blocks are converted, and those that are refused with the reason.

For another one, give :data:`FAMILIES` what distinguishes it; with ``settings``, blocks are written
for it as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nl_detectron.weights import keras
from nl_detectron.weights.block import BATCH_NORMS, CONVS, Block, common_reduction
from nl_detectron.weights.conversion import ConversionError
from nl_detectron.weights.family import Family, Part
from nl_detectron.weights.resnets import CAFFE2_NORM, convert_caffe2_backbone

_EITHER = (True, False)
# Pairwise functions that have no logits to scale.
_NO_SOFTMAX: Mapping[str, Sequence[bool]] = {"dot_product": (), "concatenation": ()}
_SOFTMAX = ("gaussian", "embedded_gaussian", "disentangled")
_PLACE = re.compile(r"(?:.*\.)?res([2-5])\.nonlocal(\d+)")
_CHILD = ".nonlocal"
_MMCV_NORMS = {"": None, "GN": {"type": "GN", "num_groups": 32}}


def _parts(**names: str | Part) -> dict[str, Part]:
    return {key: Part(name) if isinstance(name, str) else name for key, name in names.items()}


def _our_settings(blocks: Mapping[str, Block], notes: list[str]) -> dict[str, Any]:
    """One MODEL.NONLOCAL for all; without the places if the place of a block is not known."""
    names, first = list(blocks), next(iter(blocks.values())).traits
    for name, block in blocks.items():
        if block.traits != first:
            raise ConversionError(
                f"{names[0]} and {name} differ, and MODEL.NONLOCAL holds for all: "
                f"{first} and {block.traits}"
            )
    node: dict[str, Any] = {"REDUCTION": common_reduction(blocks.values())}
    if first.pairwise == "global_context":
        node = {"BLOCK": "GlobalContextBlock", **node}
    else:
        node = {"PAIRWISE": first.pairwise, **node, "SCALE": first.scale}
        node |= {"SUBSAMPLE": first.subsample, "NORM": first.norm}
    if first.pairwise == "disentangled":
        node["TEMPERATURE"] = first.temperature
    modules = [name.removesuffix(_CHILD) for name in names if name.endswith(_CHILD)]
    in_stages = [match for match in map(_PLACE.fullmatch, names) if match]
    if lost := [n for n in names if not (_PLACE.fullmatch(n) or n.endswith(_CHILD))]:
        notes.append(
            f"The place of {', '.join(map(repr, lost))} in our model is not known, so "
            "AFTER_BLOCKS_PER_STAGE is left to you. rename (convert_weights.py: --rename OLD=NEW) "
            "puts a block in its place: NEW is res4.nonlocal4 for one after residual block 4 of "
            "res4."
        )
        return {"MODEL": {"NONLOCAL": node}}
    node["AFTER_BLOCKS_PER_STAGE"] = [
        sorted(int(match[2]) for match in in_stages if match[1] == stage) for stage in "2345"
    ]
    if modules:  # of a ResNet alone, or of the one in an FPN
        node["AFTER_MODULES"] = [f"*{module.removeprefix('backbone.')}" for module in modules]
    return {"MODEL": {"BACKBONE": {"NAME": "build_nonlocal_backbone"}, "NONLOCAL": node}}


def _mmcv_settings(blocks: Mapping[str, Block], notes: list[str]) -> dict[str, Any]:
    """The arguments of NonLocal1d, 2d or 3d, by block."""
    return {
        name: {
            "type": f"NonLocal{len(block.shape) - 2}d",
            "in_channels": block.in_channels,
            "reduction": common_reduction([block]),
            "use_scale": block.traits.scale,
            "mode": block.traits.pairwise,
            "sub_sample": block.traits.subsample == "embeddings",
            "norm_cfg": _MMCV_NORMS.get(block.traits.norm, {"type": "BN"}),
        }
        for name, block in blocks.items()
    }


def _pytorchvideo_settings(blocks: Mapping[str, Block], notes: list[str]) -> dict[str, Any]:
    """The arguments of ``create_nonlocal``, by block."""
    return {
        name: {
            "dim_in": block.in_channels,
            "dim_inner": block.inner_channels,
            "pool_size": [1, 2, 2] if block.traits.subsample == "input" else None,
            "instantiation": {"dot_product": "dot_product"}.get(block.traits.pairwise, "softmax"),
            **({} if block.traits.norm else {"norm": None}),  # by default it has batch norm
        }
        for name, block in blocks.items()
    }


def _to_mmcv(block: Block) -> None:
    """Its w_f is a 2-D convolution in the 1-D and 3-D blocks too."""
    if block.traits.pairwise == "disentangled":
        raise ConversionError(
            f"{block.title}: mmcv has no pairwise='disentangled', only mmsegmentation has, which "
            "blocks are not written for"
        )
    if "concat.weight" in block.tensors:
        weight = block.tensors["concat.weight"]
        block.tensors["concat.weight"] = weight.reshape(1, -1, 1, 1)


def _from_gcnet(block: Block) -> None:
    for name in ("norm.weight", "norm.bias"):
        if name in block.tensors:  # if not, that is said later
            block.change(name, block.tensors[name].flatten(), "its two dimensions of 1 left out")
    if "context" not in block.parts:
        weight = block.tensors["reduce.weight"]
        note = "zeros: it averages (pooling_type 'avg'), as a softmax of zeros does"
        block.change("context.weight", weight.new_zeros(1, *weight.shape[1:]), note)
        block.change("context.bias", weight.new_zeros(1), note)


def _from_timm(block: Block) -> None:
    if block.traits.scale:
        factor = (block.inner_channels / block.in_channels) ** 0.5
        block.multiply_theta(
            factor, f"times (d/C)^1/2 = {factor:.6g}: timm scales by C^-1/2, we by d^-1/2"
        )


def _is_slowfast(names: Sequence[str]) -> bool:
    return any(re.search(r"(^|\.)pathway\d+_nonlocal\d+\.|(^|\.)bn\.", name) for name in names)


_PYTORCHVIDEO = _parts(theta="conv_theta", phi="conv_phi", g="conv_g", out="conv_out", norm="norm")

FAMILIES: dict[str, Family] = {
    "nl_detectron": Family(
        title="nl_detectron",
        parts={name: Part(name) for name in (*CONVS, "norm")},
        scales={**dict.fromkeys(_SOFTMAX, _EITHER), **_NO_SOFTMAX, "global_context": ()},
        needs=(frozenset({"g", "out"}), frozenset({"context", "reduce", "out"})),
        usual={"pairwise": "embedded_gaussian", "scale": True, "subsample": "embeddings"},
        settings=_our_settings,
        dims=(2, 1, 3),
        norms=("", *BATCH_NORMS, "GN", "LN"),
    ),
    # Its nonlocal_helper.py, and its backbone.
    "caffe2": Family(
        title="video-nonlocal-net (Caffe2)",
        parts=_parts(theta="theta", phi="phi", g="g", out="out", norm="bn"),
        leaves={"w": "weight", **CAFFE2_NORM},
        separator="_",
        optimizer=("_momentum",),
        place_names=(r"nonlocal_conv(\d)(?:_group)?_(\d+)", r"res\1.nonlocal\2"),
        scales={"embedded_gaussian": _EITHER, "dot_product": ()},
        subsample=("input", "none"),
        no_bias=("theta", "phi", "g", "out"),
        affine=True,
        norm_eps=1.0000001e-5,
        usual={"pairwise": "embedded_gaussian", "scale": True, "subsample": "input"},
        assume_usual=True,
        convert_rest=convert_caffe2_backbone,
    ),
    # mmcv 2.2's non_local.py, which mmdetection uses, and mmsegmentation 1.2's disentangled block,
    # which is derived from it.
    "mmcv": Family(
        title="mmcv",
        parts=_parts(
            theta="theta.conv",
            phi=Part("phi.conv", pooled="phi.0.conv"),
            g=Part("g.conv", pooled="g.0.conv"),
            out="conv_out.conv",
            norm=Part("conv_out.bn", group_norm="conv_out.gn"),
            concat="concat_project.conv",
            unary="conv_mask",
        ),
        scales={**dict.fromkeys(_SOFTMAX, _EITHER), "gaussian": (False,), **_NO_SOFTMAX},
        subsample=("none", "embeddings"),
        no_bias=("out",),
        usual={"pairwise": "embedded_gaussian", "scale": True},
        settings=_mmcv_settings,
        dims=(None, 1, 2, 3),
        norms=("", *BATCH_NORMS, "GN"),
        to_theirs=_to_mmcv,
    ),
    # The pairwise function is the file that the class was imported from, so there is no usual one.
    "alexhex7": Family(
        title="AlexHex7/Non-local_pytorch",
        parts=_parts(
            theta="theta",
            phi=Part("phi", pooled="phi.0"),
            g=Part("g", pooled="g.0"),
            out=Part("W.0", read_only="W"),
            norm="W.1",
            concat="concat_project.0",
        ),
        scales={"gaussian": (False,), "embedded_gaussian": (False,), **_NO_SOFTMAX},
        subsample=("none", "embeddings"),
    ),
    # SlowFast's nonlocal_helper.py and PyTorchVideo 0.1.5's nonlocal_net.py: the same block; only
    # the names of the norm and of the block differ.
    "slowfast": Family(
        title="SlowFast",
        parts={**_PYTORCHVIDEO, "norm": Part("bn", read_only="norm")},
        scales={"embedded_gaussian": (True,), "dot_product": ()},
        subsample=("input", "none"),
        place_names=(r"(?:.*\.)?s(\d)\.pathway0_nonlocal(\d+)", r"res\1.nonlocal\2"),
        recognises=_is_slowfast,
        usual={"pairwise": "dot_product", "subsample": "input"},
    ),
    "pytorchvideo": Family(
        title="PyTorchVideo",
        parts=_PYTORCHVIDEO,
        scales={"embedded_gaussian": (True,), "dot_product": ()},
        subsample=("input", "none"),
        recognises=lambda names: not _is_slowfast(names),
        usual={"pairwise": "embedded_gaussian", "subsample": "none"},
        settings=_pytorchvideo_settings,
        dims=(3,),
        norms=("", *BATCH_NORMS),
    ),
    # timm 1.0's non_local_attn.py.
    "timm": Family(
        title="timm",
        parts=_parts(theta="t", phi="p", g="g", out="z", norm="norm"),
        scales={"embedded_gaussian": _EITHER},
        subsample=("none",),
        usual={"scale": True},
        assume_usual=True,
        to_ours=_from_timm,
    ),
    # Its context_block.py, which is mmcv's and mmdetection's, too.
    "gcnet": Family(
        title="GCNet",
        parts=_parts(
            context="conv_mask",
            reduce="channel_add_conv.0",
            norm="channel_add_conv.1",
            out="channel_add_conv.3",
            # It multiplies x by a second transform, and the rest of it is no part of our block.
            factor="channel_mul_conv.3",
        ),
        scales={"global_context": ()},
        needs=(frozenset({"reduce", "out"}), frozenset({"factor"})),
        to_ours=_from_gcnet,
    ),
    "keras": keras.FAMILY,
    # What is recognised to be refused.
    "dnl": Family(
        title="DNL",
        parts=_parts(
            theta="conv_query", phi="conv_key", g="conv_value", unary="conv_mask", out="conv_out"
        ),
        needs=(frozenset({"theta", "phi", "g"}),),
        refusal="DNL's own gamma multiplies the pairs' term only, not the unary one, and our block "
        "has one W_z for the sum of both, so that it cannot compute the same (mmsegmentation's DNL "
        "can be converted)",
    ),
    "ann": Family(
        title="ANN",  # MendelXu/ANN's; read_only are mmsegmentation's
        parts=_parts(
            theta=Part("f_query.0", read_only="query_project.conv"),
            phi=Part("f_key.0", read_only="key_project.conv"),
            g=Part("f_value", read_only="value_project"),
            out=Part("W", read_only="out_project"),
        ),
        needs=(frozenset({"theta", "phi", "g", "out"}),),
        refusal="ANN's theta and phi end in batch norm and a ReLU, and its result is concatenated "
        "to x, not added, so that our block cannot compute the same",
    ),
}
