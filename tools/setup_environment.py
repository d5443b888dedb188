#!/usr/bin/env python3
"""Fill a virtual environment with all that the demo and the tests need (`make setup`).

A Detectron2 that is already installed, in the environment itself or in the Python that runs this
file, is used as it is, together with its PyTorch; only what is missing is added. Where there is
none, the versions of requirements.txt are installed and Detectron2 v0.6 is built. The options ask
for others.

An environment that an interrupted run leaves incomplete is made anew by the next one. Only the
standard library is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
LINK = "detectron2_of_another_python.pth"
OLD_SETUPTOOLS = "setuptools<81"  # with pkg_resources, which Detectron2's main branch imports


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", type=Path, help="the virtual environment's folder")
    versions = "the versions to install where there is no Detectron2 (default: %(default)s)"
    parser.add_argument("--requirements", default="requirements.txt", metavar="FILE", help=versions)
    source = "compile this Detectron2, a folder or a URL for pip, whatever is there already"
    parser.add_argument("--detectron2", metavar="SOURCE", help=source)
    options = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        sys.exit(
            f"{sys.executable} is Python {sys.version.split()[0]}, and at least {oldest} is "
            "needed: choose another with `make setup PYTHON=/path/to/python3`."
        )
    try:
        fill(Environment(options.environment.absolute()), options.requirements, options.detectron2)
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        sys.exit(f"The set-up stopped: `{command}` failed. Run it again when that is solved.")


class Environment:
    """A virtual environment, looked at from outside."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.python = directory / "bin" / "python"
        self.incomplete = directory / ".incomplete"  # is there while a new environment is filled

    @property
    def site_packages(self) -> Path:
        script = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(output(self.python, "-c", script))

    def create(self) -> None:
        """Make a new environment, unless there is one that works and is not incomplete."""
        if self.incomplete.exists() or not succeeds(self.python, "-c", ""):
            self.python.unlink(missing_ok=True)  # first: without it, no half of the rest counts
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            self.incomplete.touch()
            subprocess.run([sys.executable, "-m", "venv", self.directory], check=True)
        if not succeeds(self.python, "-m", "pip", "--version"):
            subprocess.run([self.python, "-m", "ensurepip", "--upgrade"], check=True)

    def link(self, folders: list[str]) -> None:
        """Make the packages in these folders visible, after the environment's own."""
        lines = (f"import site; site.addsitedir({folder!r})\n" for folder in folders)
        (self.site_packages / LINK).write_text("".join(lines), encoding="utf-8")

    def pip_install(self, *arguments: str) -> None:
        pip = (self.python, "-m", "pip", "--disable-pip-version-check")
        subprocess.run([*pip, "install", "--no-warn-conflicts", *arguments], cwd=ROOT, check=True)


def fill(environment: Environment, requirements: str, source: str | None) -> None:
    environment.create()
    environment.pip_install("--quiet", "--no-deps", "--requirement", "requirements-peers.txt")
    detectron2 = None if source else find_existing_detectron2(environment)
    if detectron2:
        print(f"Detectron2 in {detectron2} is used as it is.", flush=True)
        kept = versions_to_keep(environment)
        environment.pip_install("--quiet", *kept, "--editable", ".[dev]")
    else:
        install_detectron2(environment, requirements, source)
    environment.incomplete.unlink(missing_ok=True)


def install_detectron2(environment: Environment, requirements: str, source: str | None) -> None:
    print("PyTorch and the rest come now: 3 GB to download, 6 GB on disk, minutes.", flush=True)
    environment.pip_install("--requirement", requirements)
    if source:
        # Its setup.py imports torch, so that it is built here and not in isolation.
        environment.pip_install(OLD_SETUPTOOLS, "ninja")
        environment.pip_install("--no-build-isolation", source)
    else:
        builder = ROOT / "tools" / "build_detectron2.py"
        subprocess.run([environment.python, builder, "--install"], check=True)
    environment.pip_install("--quiet", "--no-deps", "--editable", ".")


def find_existing_detectron2(environment: Environment) -> str | None:
    """Look for a Detectron2 that somebody else installed, and make the environment see it."""
    own_build = environment.site_packages / "detectron2" / "_C.py"
    if own_build.is_file():
        return None
    if location := detectron2_of(environment.python):
        return location
    (environment.site_packages / LINK).unlink(missing_ok=True)
    if not (location := detectron2_of(sys.executable)):
        return None
    packages = ("site-packages", "dist-packages")
    environment.link([folder for folder in sys.path if Path(folder).name in packages])
    if not detectron2_of(environment.python):
        sys.exit(
            f"Detectron2 in {location} cannot be imported by {environment.python}: "
            f"remove {environment.directory}, so that it is made anew with {sys.executable}."
        )
    return location


def detectron2_of(python: str | Path) -> str | None:
    """Where this Python has a Detectron2 that can be imported, together with its PyTorch."""
    try:
        return output(python, "-c", "import torch, detectron2; print(detectron2.__path__[0])")
    except subprocess.CalledProcessError:
        return None


def versions_to_keep(environment: Environment) -> list[str]:
    """What the existing Detectron2 needs: pip must not put other versions before these."""
    versions = []
    for name in ("torch", "torchvision", "numpy"):
        script = f"from importlib.metadata import version; print(version({name!r}))"
        with contextlib.suppress(subprocess.CalledProcessError):  # raised where it is missing
            versions.append(f"{name}=={output(environment.python, '-c', script)}")
    if not succeeds(environment.python, "-c", "import detectron2.model_zoo"):
        versions.append(OLD_SETUPTOOLS)
    return versions


def output(*command: str | Path) -> str:
    # From the root folder, because a package in the working directory must not count as installed.
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, cwd="/"
    )
    return done.stdout.strip()


def succeeds(*command: str | Path) -> bool:
    try:
        output(*command)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


if __name__ == "__main__":
    main()
