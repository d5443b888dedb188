"""The package as it is installed and imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **options
    )


def test_import_without_detectron2_says_what_to_do():
    script = "import sys; sys.modules['detectron2'] = None; import nl_detectron"
    result = python("-c", script, cwd=ROOT)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: nl_detectron needs Detectron2")
    assert "make setup" in message


def test_importing_registers_everything():
    script = """
import nl_detectron
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.roi_heads import ROI_KEYPOINT_HEAD_REGISTRY
assert "build_nonlocal_backbone" in BACKBONE_REGISTRY
assert "NonLocalKeypointHead" in ROI_KEYPOINT_HEAD_REGISTRY
assert {"shapes_train", "shapes_val"} <= set(DatasetCatalog.list())
"""
    assert python("-c", script, cwd=ROOT).returncode == 0


def test_configs_are_installed_with_the_package(tmp_path):
    pytest.importorskip("setuptools")
    folders = ["--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    result = python("setup.py", "--quiet", "build", *folders, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    library = tmp_path / "lib"
    files = [p for suffix in ("yaml", "py") for p in ROOT.glob(f"configs/**/*.{suffix}")]
    installed = {p for p in (library / "nl_detectron" / "configs").rglob("*") if p.is_file()}
    assert installed == {library / "nl_detectron" / p.relative_to(ROOT) for p in files}
    assert {p.name for p in (tmp_path / "lib").iterdir()} == {"nl_detectron"}
