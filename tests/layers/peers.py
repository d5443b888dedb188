"""Modules of packages that are installed without what they depend on."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType
from unittest import mock

import pytest
from torch import nn


@functools.cache  # it registers itself with mmengine, which takes no second one
def mmsegmentation() -> tuple[ModuleType, ModuleType]:
    """
    The modules of mmsegmentation with the decode heads of DNL and ANN, and the blocks in them. Its
    packages, which import all there is and refuse recent versions of mmcv, are passed by, and so
    are the classes that the heads are made of; nothing of it stays in ``sys.modules``.
    """
    pytest.importorskip("mmcv.cnn")
    spec = importlib.util.find_spec("mmseg")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs mmsegmentation")
    heads = "mmseg.models.decode_heads"
    contents = {
        "mmseg": {},
        "mmseg.models": {},
        "mmseg.models.utils": {},
        heads: {},
        f"{heads}.fcn_head": {"FCNHead": nn.Module},
        f"{heads}.decode_head": {"BaseDecodeHead": nn.Module},
    }
    packages = {}
    for name, attributes in contents.items():
        packages[name] = ModuleType(name)
        folder = [spec.submodule_search_locations[0], *name.split(".")[1:]]
        packages[name].__dict__.update(attributes, __path__=["/".join(folder)])
    with mock.patch.dict(sys.modules, packages):
        attention = importlib.import_module("mmseg.models.utils.self_attention_block")
        packages["mmseg.models.utils"].__dict__.update(vars(attention))
        return (
            importlib.import_module(f"{heads}.dnl_head"),
            importlib.import_module(f"{heads}.ann_head"),
        )
