"""How `make setup` repairs an interrupted installation and finds an existing Detectron2."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

import setup_environment
from setup_environment import Environment

HALF_INSTALLED = {
    "cut off before pip's last step": "INSTALLER",
    "its files half removed": "package.py",
}


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    venv.create(tmp_path / "an environment", with_pip=False)
    return Environment(tmp_path / "an environment")


def install(site_packages: Path) -> Path:
    """Lay down a package as pip does; returns its metadata."""
    metadata_folder = site_packages / "package-1.0.dist-info"
    metadata_folder.mkdir(parents=True)
    (site_packages / "package.py").touch()
    (metadata_folder / "INSTALLER").write_text("pip\n")
    (metadata_folder / "RECORD").write_text(
        "package.py,sha256=x,0\n__pycache__/package.cpython-311.pyc,,\n"
        "package-1.0.dist-info/INSTALLER,,\n"
    )
    return metadata_folder


def install_detectron2(site_packages: Path) -> Path:
    """Something that can be imported as Detectron2 and PyTorch."""
    package = site_packages / "detectron2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (site_packages / "torch.py").touch()
    return package


def test_complete_package_stays(environment: Environment) -> None:
    package = install(environment.site_packages)
    environment.forget_half_installed()
    assert setup_environment.is_complete(metadata.PathDistribution(package))


@pytest.mark.parametrize("missing", HALF_INSTALLED.values(), ids=HALF_INSTALLED)
def test_half_installed_package_is_forgotten(environment: Environment, missing: str) -> None:
    package = install(environment.site_packages)
    next(environment.site_packages.rglob(missing)).unlink()
    environment.forget_half_installed()
    assert not package.exists()


def test_detectron2_of_the_environment_itself_is_kept(environment: Environment) -> None:
    package = install_detectron2(environment.site_packages)
    found = setup_environment.find_existing_detectron2(environment)
    assert Path(found or "").samefile(package)
    assert not (environment.site_packages / setup_environment.LINK).exists()


def test_detectron2_of_another_python_is_made_visible(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    venv.create(other, with_pip=False)
    other_environment = Environment(other)
    package = install_detectron2(other_environment.site_packages)
    monkeypatch.setattr(sys, "executable", str(other_environment.python))
    monkeypatch.setattr(sys, "path", [str(other_environment.site_packages)])

    found = setup_environment.find_existing_detectron2(environment)

    assert Path(found or "").samefile(package)
    script = "import detectron2; print(detectron2.__path__[0])"
    seen = subprocess.run(
        [environment.python, "-c", script], cwd="/", capture_output=True, text=True, check=True
    )
    assert Path(seen.stdout.strip()).samefile(package)


def test_without_any_detectron2_nothing_is_found(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False)
    monkeypatch.setattr(sys, "executable", str(Environment(bare).python))
    assert setup_environment.find_existing_detectron2(environment) is None
