"""How `make setup` replaces an incomplete environment and finds an existing Detectron2."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

import setup_environment
from setup_environment import Environment


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    venv.create(tmp_path / "an environment", with_pip=False)
    return Environment(tmp_path / "an environment")


def install_detectron2(site_packages):
    """Something that can be imported as Detectron2 and PyTorch."""
    package = site_packages / "detectron2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (site_packages / "torch.py").touch()
    return package


def test_environment_that_works_stays(environment):
    package = install_detectron2(environment.site_packages)
    (environment.site_packages / "pip.py").touch()
    environment.create()
    assert package.exists()
    assert not environment.incomplete.exists()


@pytest.mark.parametrize("damage", ["interrupted while it was filled", "Python is gone"])
def test_incomplete_environment_is_made_anew(environment, damage):
    package = install_detectron2(environment.site_packages)
    if damage == "Python is gone":
        environment.python.unlink()
    else:
        environment.incomplete.touch()
    environment.create()
    assert not package.exists()
    assert setup_environment.succeeds(environment.python, "-m", "pip", "--version")
    assert environment.incomplete.exists()  # until it is filled


def test_interrupted_removal_leaves_no_environment_that_seems_to_work(environment, monkeypatch):
    def interrupted(*_, **__):
        environment.incomplete.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_environment.shutil, "rmtree", interrupted)
    environment.incomplete.touch()
    with pytest.raises(KeyboardInterrupt):
        environment.create()
    assert not setup_environment.succeeds(environment.python, "-c", "")


def test_detectron2_that_needs_pkg_resources_gets_it(environment):
    package = install_detectron2(environment.site_packages)
    model_zoo = package / "model_zoo.py"
    model_zoo.touch()
    assert setup_environment.versions_to_keep(environment) == []
    model_zoo.write_text("import pkg_resources\n")
    assert setup_environment.versions_to_keep(environment) == ["setuptools<81"]


@pytest.mark.parametrize("source", [None, "a folder"])
def test_detectron2_of_a_source_is_compiled_with_pkg_resources(environment, monkeypatch, source):
    installed = []
    built = []
    monkeypatch.setattr(Environment, "create", lambda _: None)
    monkeypatch.setattr(Environment, "pip_install", lambda _, *words: installed.append(words))
    monkeypatch.setattr(setup_environment, "find_existing_detectron2", lambda _: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: built.append(command))
    setup_environment.fill(environment, "oldest.txt", source)
    assert ("--requirement", "oldest.txt") in installed
    assert bool(built) == (source is None)
    if source:
        first = next(i for i, words in enumerate(installed) if "setuptools<81" in words)
        assert ("--no-build-isolation", source) in installed[first:]


def test_detectron2_of_the_environment_itself_is_kept(environment):
    package = install_detectron2(environment.site_packages)
    found = setup_environment.find_existing_detectron2(environment)
    assert Path(found or "").samefile(package)
    assert not (environment.site_packages / setup_environment.LINK).exists()


def test_detectron2_of_another_python_is_made_visible(environment, tmp_path, monkeypatch):
    other = tmp_path / "other"
    venv.create(other, with_pip=False)
    other_environment = Environment(other)
    package = install_detectron2(other_environment.site_packages)
    monkeypatch.setattr(sys, "executable", str(other_environment.python))
    monkeypatch.setattr(sys, "path", [str(other_environment.site_packages)])

    found = setup_environment.find_existing_detectron2(environment)

    assert Path(found or "").samefile(package)
    script = "import detectron2; print(detectron2.__path__[0])"
    command = [environment.python, "-c", script]
    seen = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True, timeout=60)
    assert Path(seen.stdout.strip()).samefile(package)


def test_without_any_detectron2_nothing_is_found(environment, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False)
    monkeypatch.setattr(sys, "executable", str(Environment(bare).python))
    assert setup_environment.find_existing_detectron2(environment) is None


def test_pip_does_not_complain_of_what_was_there_before(environment, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    environment.pip_install("numpy")
    assert "--no-warn-conflicts" in commands[0]
