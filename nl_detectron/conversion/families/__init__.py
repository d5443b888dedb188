"""
The implementations whose non-local blocks are converted, a module each.

For a further one, write a module with what distinguishes it, a :class:`Family`, and give it a line
below. One that is to be written as well gets a :class:`Target`.
"""

from __future__ import annotations

from nl_detectron.conversion.families import (
    caffe2,
    mmcv,
    non_local_pytorch,
    ours,
    pytorchvideo,
    slowfast,
    timm,
)
from nl_detectron.conversion.family import Family

FAMILIES: dict[str, Family] = {
    "nl_detectron": ours.FAMILY,
    "caffe2": caffe2.FAMILY,
    "mmcv": mmcv.FAMILY,
    "alexhex7": non_local_pytorch.FAMILY,
    "slowfast": slowfast.FAMILY,
    "pytorchvideo": pytorchvideo.FAMILY,
    "timm": timm.FAMILY,
}
