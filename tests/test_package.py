"""The package as it is installed and imported."""

import re
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nl_detectron import model_zoo
from tests.commands import ROOT, run, start_python

WITHOUT_DETECTRON2 = """
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        is_absent = name.partition(".")[0] in {absent}
        return None if is_absent else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder that the wheel's content lies in."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    folders = ["--bdist-dir", str(folder / "build"), "--dist-dir", str(folder)]
    source = folder / "source"  # a build leaves files beside setup.py
    shutil.copytree(ROOT / "nl_detectron", source / "nl_detectron")
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    result = start_python("setup.py", "--quiet", "bdist_wheel", *folders, cwd=source)
    assert result.returncode == 0, result.stderr
    (file,) = folder.glob("*.whl")
    shutil.unpack_archive(file, folder / "content", "zip")
    return folder / "content"


def test_the_wheel_has_every_file(wheel):
    package, configs = ROOT / "nl_detectron", ROOT / "configs"
    expected = {p.relative_to(ROOT) for p in package.rglob("*.*") if p.suffix != ".pyc"}
    files = [p for suffix in ("yaml", "py") for p in configs.rglob(f"*.{suffix}")]
    expected |= {Path("nl_detectron", p.relative_to(ROOT)) for p in files}
    found = {p.relative_to(wheel) for p in (wheel / "nl_detectron").rglob("*") if p.is_file()}
    assert found == expected
    assert {p.name.partition("-")[0] for p in wheel.iterdir()} == {"nl_detectron"}


def distributions(requirements):
    """The names of these and of all that they need, without extras."""
    names, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        marker = requirement.marker
        if name not in names and (marker is None or marker.evaluate({"extra": ""})):
            names.add(name)
            waiting += map(Requirement, metadata.distribution(name).requires or ())
    return names


def test_what_is_declared_is_enough(wheel, tmp_path):
    """With what the wheel asks for, and Detectron2, and nothing else of what is installed."""
    (about,) = wheel.glob("*.dist-info/METADATA")
    declared = metadata.PathDistribution(about.parent).requires
    assert len(declared) > 20
    present = distributions([*declared, "detectron2"])
    absent = {
        module
        for module, names in metadata.packages_distributions().items()
        if present.isdisjoint(re.sub(r"[-_.]+", "-", name).lower() for name in names)
    }
    absent -= {"nl_detectron"}  # this checkout
    assert {"pytest", "shapely", "timm"} <= absent
    script = """
import importlib, pkgutil, sys
import nl_detectron
from detectron2.config import get_cfg
assert nl_detectron.__file__.startswith(sys.argv[1])
for module in pkgutil.walk_packages(nl_detectron.__path__, "nl_detectron."):
    if module.name.rpartition(".")[2] != "__main__" and ".toy" not in module.name:
        if not module.name.startswith("nl_detectron.configs."):
            importlib.import_module(module.name)
cfg = get_cfg()
nl_detectron.add_nonlocal_config(cfg)
cfg.merge_from_file(nl_detectron.model_zoo.get_config_file(sys.argv[2]))
nl_detectron.use_nonlocal_backbone(cfg)
nl_detectron.model_zoo.get_config(sys.argv[2] + ".py")
assert len(nl_detectron.model_zoo.list_trained()) > 40
print(*nl_detectron.model_zoo.list_configs(), sep="\\n")
"""
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x"
    result = start_python(
        *("-P", "-c", WITHOUT_DETECTRON2.format(absent=absent) + script, str(wheel), name),
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == model_zoo.list_configs()
