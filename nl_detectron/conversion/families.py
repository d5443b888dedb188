"""
Who calls the parts of a non-local block what, and what each implementation computes with them.

Checked against the source of each: video-nonlocal-net's ``nonlocal_helper.py``, mmcv 2.2's
``non_local.py``, AlexHex7/Non-local_pytorch, SlowFast's ``nonlocal_helper.py``, PyTorchVideo
0.1.5's ``nonlocal_net.py`` and timm 1.0's ``non_local_attn.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TORCH_LEAVES = {
    leaf: leaf for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}
_SOFTMAX_OR_DOT = ("embedded_gaussian", "dot_product")
_EITHER = (True, False)
_PAIRWISE = ("gaussian", *_SOFTMAX_OR_DOT, "concatenation")
_SUBSAMPLE = ("none", "embeddings", "input")
BATCH_NORMS = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN")


@dataclass(frozen=True)
class Family:
    """
    An implementation. Where it leaves open what a block computes, the names don't tell, and
    whoever converts has to; ``usual`` holds what its code does unless told otherwise.

    Attributes:
        title: its name for people.
        modules: our name of a part to theirs.
        pooled: the same for parts that are called otherwise when they are subsampled.
        aliases: further names of theirs to ours.
        leaves: their name of a parameter or buffer to ours.
        separator: between block, part and leaf.
        not_weights: how the names of the optimizer's tensors end.
        places: their name of a block (a pattern) and ours (a template).
        pairwise: the pairwise functions it has.
        scale: for those with a softmax, whether it scales the logits by d ** -0.5.
        scale_by_input: it scales by C ** -0.5 instead.
        subsample: the ways of subsampling it has. With ``pooled`` the names tell which.
        no_bias: parts that may lack their bias; "out" with a norm never has one then.
        norms: those it can have, in our words.
        norm_aliases: its name of the norm where it depends on the kind.
        dims: 1, 2 or 3 where it has no others.
        concat_dims: the same of the concatenation's w_f alone.
        affine: a norm without statistics is one multiplication and addition per channel.
        norm_eps: epsilon of its batch norm.
        usual: what it does by default.
        assume_usual: all its published weights were made so.
        recognises: whether a block with these names is its.
    """

    title: str
    modules: Mapping[str, str]
    pooled: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=lambda: _TORCH_LEAVES)
    separator: str = "."
    not_weights: tuple[str, ...] = ()
    places: tuple[str, str] | None = None
    pairwise: Sequence[str] = _PAIRWISE
    scale: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    scale_by_input: bool = False
    subsample: Sequence[str] = _SUBSAMPLE
    no_bias: frozenset[str] = frozenset()
    norms: Sequence[str] = ("", *BATCH_NORMS, "GN", "LN")
    norm_aliases: Mapping[str, str] = field(default_factory=dict)
    dims: int | None = None
    concat_dims: int | None = None
    affine: bool = False
    norm_eps: float = 1e-5
    usual: Mapping[str, Any] = field(default_factory=dict)
    assume_usual: bool = False
    recognises: Callable[[Sequence[str]], bool] = lambda names: True

    def pattern(self) -> re.Pattern[str]:
        """Matches a full name; groups: block (None at the root), part, leaf."""
        separator = re.escape(self.separator)
        parts = "|".join(map(re.escape, self.parts()))
        leaves = "|".join(map(re.escape, self.leaves))
        return re.compile(rf"(?:(.*){separator})?({parts}){separator}({leaves})")

    def parts(self) -> dict[str, str]:
        """Their names of the parts to ours."""
        theirs = {
            name: part for names in (self.modules, self.pooled) for part, name in names.items()
        }
        return {**theirs, **self.aliases}


def _modules(theta: str, phi: str, g: str, out: str, norm: str, concat: str = "") -> dict[str, str]:
    """``concat`` is empty for an implementation without the concatenation."""
    names = {"theta": theta, "phi": phi, "g": g, "out": out, "norm": norm}
    return {**names, "concat": concat} if concat else names


def _is_slowfast(names: Sequence[str]) -> bool:
    """SlowFast and PyTorchVideo differ in nothing but the name of the norm and of the block."""
    return any(re.search(r"(^|\.)pathway\d+_nonlocal\d+\.|(^|\.)bn\.", name) for name in names)


FAMILIES: dict[str, Family] = {
    "nl_detectron": Family(
        title="nl_detectron",
        modules=_modules("theta", "phi", "g", "out", "norm", "concat"),
        scale={"embedded_gaussian": _EITHER, "gaussian": _EITHER},
        usual={"pairwise": "embedded_gaussian", "scale": True, "subsample": "embeddings"},
    ),
    "caffe2": Family(
        title="video-nonlocal-net (Caffe2)",
        modules=_modules("theta", "phi", "g", "out", "bn"),
        # riv is called the inverse of the variance, but holds the variance.
        leaves={
            "w": "weight",
            "b": "bias",
            "s": "weight",
            "rm": "running_mean",
            "riv": "running_var",
        },
        separator="_",
        not_weights=("_momentum",),
        places=(r"nonlocal_conv(\d)(?:_group)?_(\d+)", r"res\1.nonlocal\2"),
        pairwise=_SOFTMAX_OR_DOT,
        scale={"embedded_gaussian": _EITHER},
        subsample=("input", "none"),
        no_bias=frozenset(("theta", "phi", "g", "out")),
        affine=True,
        norm_eps=1.0000001e-5,
        usual={"pairwise": "embedded_gaussian", "scale": True, "subsample": "input"},
        assume_usual=True,
    ),
    "mmcv": Family(
        title="mmcv",
        modules=_modules(
            "theta.conv",
            "phi.conv",
            "g.conv",
            "conv_out.conv",
            "conv_out.bn",
            "concat_project.conv",
        ),
        pooled={"phi": "phi.0.conv", "g": "g.0.conv"},
        aliases={"conv_out.gn": "norm"},
        norms=("", *BATCH_NORMS, "GN"),
        norm_aliases={"GN": "conv_out.gn"},
        concat_dims=2,
        scale={"embedded_gaussian": _EITHER, "gaussian": (False,)},
        subsample=("none", "embeddings"),
        no_bias=frozenset(("out",)),
        usual={"pairwise": "embedded_gaussian", "scale": True},
    ),
    "alexhex7": Family(
        title="AlexHex7/Non-local_pytorch",
        modules=_modules("theta", "phi", "g", "W.0", "W.1", "concat_project.0"),
        pooled={"phi": "phi.0", "g": "g.0"},
        aliases={"W": "out"},
        scale={"embedded_gaussian": (False,), "gaussian": (False,)},
        subsample=("none", "embeddings"),
        # The pairwise function is the file that the class was imported from.
    ),
    "slowfast": Family(
        title="SlowFast",
        modules=_modules("conv_theta", "conv_phi", "conv_g", "conv_out", "bn"),
        aliases={"norm": "norm"},
        places=(r"(?:.*\.)?s(\d)\.pathway0_nonlocal(\d+)", r"res\1.nonlocal\2"),
        pairwise=_SOFTMAX_OR_DOT,
        scale={"embedded_gaussian": (True,)},
        subsample=("input", "none"),
        usual={"pairwise": "dot_product", "subsample": "input"},
        recognises=_is_slowfast,
    ),
    "pytorchvideo": Family(
        title="PyTorchVideo",
        modules=_modules("conv_theta", "conv_phi", "conv_g", "conv_out", "norm"),
        pairwise=_SOFTMAX_OR_DOT,
        scale={"embedded_gaussian": (True,)},
        subsample=("input", "none"),
        norms=("", *BATCH_NORMS),
        dims=3,
        usual={"pairwise": "embedded_gaussian", "subsample": "none"},
        recognises=lambda names: not _is_slowfast(names),
    ),
    "timm": Family(
        title="timm",
        modules=_modules("t", "p", "g", "z", "norm"),
        pairwise=("embedded_gaussian",),
        scale={"embedded_gaussian": _EITHER},
        scale_by_input=True,
        subsample=("none",),
        usual={"scale": True},
        assume_usual=True,
    ),
}
