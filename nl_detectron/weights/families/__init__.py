"""
The implementations whose blocks are converted, or refused with the reason, a module each.

For another one, write a module with what distinguishes it, a :class:`Family`, and give it a line
below; with a :class:`Target` blocks are written for it as well.
"""

from __future__ import annotations

from nl_detectron.weights.families import (
    alexhex7,
    ann,
    caffe2,
    dnl,
    gcnet,
    keras,
    mmcv,
    ours,
    slowfast,
    timm,
)
from nl_detectron.weights.family import Family

FAMILIES: dict[str, Family] = {
    "nl_detectron": ours.FAMILY,
    "caffe2": caffe2.FAMILY,
    "mmcv": mmcv.FAMILY,
    "alexhex7": alexhex7.FAMILY,
    "slowfast": slowfast.SLOWFAST,
    "pytorchvideo": slowfast.PYTORCHVIDEO,
    "timm": timm.FAMILY,
    "gcnet": gcnet.FAMILY,
    "keras": keras.FAMILY,
    "dnl": dnl.FAMILY,
    "ann": ann.FAMILY,
}
