"""The package as it is installed and imported."""

import re

import pytest

from tests.commands import ROOT, run, start_python

WITHOUT_DETECTRON2 = """
import importlib.abc, sys
class OnlyPyTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, OnlyPyTorch())
"""
DETECTRON2 = {"detectron2", "fvcore", "iopath", "yacs", "omegaconf", "pycocotools", "cv2", "PIL"}
ABSENT = {*DETECTRON2, "torchvision", "tabulate", "matplotlib", "yaml", "safetensors", "tqdm"}


@pytest.mark.parametrize("name", ["add_nonlocal_config", "insert_nonlocal_blocks", "missing"])
def test_what_needs_detectron2_says_so(name):
    script = WITHOUT_DETECTRON2.format(absent=ABSENT) + f"from nl_detectron import {name}"
    result = start_python("-c", script, cwd=ROOT)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    if name == "missing":
        assert message.startswith("ImportError: cannot import name 'missing'")
        return
    assert message.startswith(f"ImportError: nl_detectron.{name} needs Detectron2")
    assert "make setup" in message


def test_the_layers_need_pytorch_alone():
    script = """
import itertools, torch
from nl_detectron.layers import *
import nl_detectron
assert nl_detectron.NonLocalBlock is NonLocalBlock
x = torch.randn(2, 32, 6, 8, requires_grad=True)
blocks = [NonLocalBlock(32, pairwise=f, subsample=s) for f in PAIRWISE for s in SUBSAMPLE]
blocks += [NonLocalBlock(32, norm=norm) for norm in ("SyncBN", "GN", "LN", "")]
for block in [*blocks, GlobalContextBlock(32, reduction=4), LocalBlock(32)]:
    if block.norm is None or "Sync" not in type(block.norm).__name__:
        block(x).square().mean().backward()
    assert x.grad.isfinite().all() and block.out_channels == 32
try:
    NonLocalBlock(32, norm="FrozenBN")
except ImportError as error:
    assert "FrozenBN" in str(error)
else:
    raise AssertionError
assert not {absent} & {name.partition(".")[0] for name in sys.modules}
"""
    script = WITHOUT_DETECTRON2.format(absent=ABSENT) + script.replace("{absent}", str(ABSENT))
    result = start_python("-c", script, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_a_broken_detectron2_is_not_taken_for_none():
    script = WITHOUT_DETECTRON2.format(absent={"fvcore"}) + "import nl_detectron"
    result = start_python("-c", script, cwd=ROOT)
    assert result.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'fvcore'"


def test_importing_registers_blocks_and_loads_nothing_else():
    script = """
import sys
import nl_detectron
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.roi_heads import ROI_KEYPOINT_HEAD_REGISTRY
assert "build_nonlocal_backbone" in BACKBONE_REGISTRY
assert "NonLocalKeypointHead" in ROI_KEYPOINT_HEAD_REGISTRY
print(*{name.split(".")[1] for name in sys.modules if name.startswith("nl_detectron.")})
assert not {"shapes_train", "long_range_val"} & set(DatasetCatalog.list())
nl_detectron.data.toy
assert {"shapes_train", "long_range_val"} <= set(DatasetCatalog.list())
"""
    result = run("-c", script, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    helpers = {"files", "submodules", "surgery", "validation"}
    assert set(result.stdout.split()) - helpers == {"config", "layers", "modeling"}


def names_in_docs():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    return sorted({n for text in texts for n in re.findall(r"\bnl_detectron(?:\.\w+)+", text)})


def test_names_in_docs_resolve_after_one_import():
    names = names_in_docs()
    assert {"nl_detectron.engine.scale_block_lr", "nl_detectron.model_zoo"} <= set(names)
    # Each in a state in which no other has loaded anything.
    script = f"""
import os
import nl_detectron
for name in {names}:
    if (pid := os.fork()) == 0:
        try:
            eval(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
    result = run("-c", script, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_no_notice_of_other_packages_on_the_screen():
    for modules in ("nl_detectron", "nl_detectron.run, nl_detectron.model_zoo, train_net"):
        result = start_python("-c", f"import {modules}", cwd=ROOT)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_configs_are_installed_with_the_package(tmp_path):
    pytest.importorskip("setuptools")
    folders = ["--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    result = start_python("setup.py", "--quiet", "build", *folders, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    library = tmp_path / "lib"
    files = [p for suffix in ("yaml", "py") for p in ROOT.glob(f"configs/**/*.{suffix}")]
    installed = {p for p in (library / "nl_detectron" / "configs").rglob("*") if p.is_file()}
    assert installed == {library / "nl_detectron" / p.relative_to(ROOT) for p in files}
    assert {p.name for p in (tmp_path / "lib").iterdir()} == {"nl_detectron"}
