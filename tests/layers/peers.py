"""Modules of packages that are installed without what they depend on."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from unittest import mock

import pytest
from torch import nn


def mmsegmentation(head: str) -> ModuleType:
    """
    The module of mmsegmentation with this decode head, and the block in it. Its packages, which
    import all there is and refuse recent versions of mmcv, are passed by, and so are the classes
    that the heads are made of; nothing of it stays in ``sys.modules``.
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
        return importlib.import_module(f"{heads}.{head}")
