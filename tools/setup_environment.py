#!/usr/bin/env python3
"""Fill a virtual environment with all that the demo and the tests need (`make setup`).

A Detectron2 that is already installed, in the environment itself or in the Python that runs this
file, is used as it is, together with its PyTorch; only what is missing is added. Where there is
none, the versions of requirements.txt are installed and Detectron2 v0.6 is built.

An interrupted run is repaired by the next one. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 9)
OLDEST_PINNED_PYTHON = (3, 11)  # for which requirements.txt has wheels
LINK = "detectron2_of_another_python.pth"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", type=Path, help="the virtual environment's folder")
    directory = parser.parse_args().environment.absolute()
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        sys.exit(
            f"{sys.executable} is Python {sys.version.split()[0]}, and at least {oldest} is "
            "needed: choose another with `make setup PYTHON=/path/to/python3`."
        )
    try:
        fill(Environment(directory))
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        sys.exit(f"The set-up stopped: `{command}` failed. Run it again to go on from there.")


class Environment:
    """A virtual environment, looked at from outside."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.python = directory / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return Path(
            output(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        )

    def create_or_repair(self) -> None:
        if not succeeds(self.python, "-c", ""):
            subprocess.run([sys.executable, "-m", "venv", "--clear", self.directory], check=True)
        self.forget_half_installed()
        if not succeeds(self.python, "-m", "pip", "--version"):
            subprocess.run([self.python, "-m", "ensurepip", "--upgrade"], check=True)

    def forget_half_installed(self) -> None:
        """Delete the metadata of packages whose installation was cut short: pip then redoes it."""
        for folder in self.site_packages.glob("*.dist-info"):
            if not is_complete(metadata.PathDistribution(folder)):
                shutil.rmtree(folder)

    def link(self, folders: list[str]) -> None:
        """Make the packages in these folders visible, after the environment's own."""
        lines = (f"import site; site.addsitedir({folder!r})\n" for folder in folders)
        (self.site_packages / LINK).write_text("".join(lines), encoding="utf-8")

    def unlink(self) -> None:
        (self.site_packages / LINK).unlink(missing_ok=True)

    def pip_install(self, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install"]
        subprocess.run([*command, *arguments], cwd=ROOT, check=True)


def fill(environment: Environment) -> None:
    environment.create_or_repair()
    environment.pip_install("--quiet", "--no-deps", "--requirement", "requirements-peers.txt")
    if detectron2 := find_existing_detectron2(environment):
        print(f"Detectron2 in {detectron2} is used as it is.", flush=True)
        kept = versions_to_keep(environment)
        environment.pip_install("--quiet", *kept, "--editable", ".[dev]")
        return
    if sys.version_info >= OLDEST_PINNED_PYTHON:
        environment.pip_install("--requirement", "requirements.txt")
    else:
        environment.pip_install("torch", "torchvision", "unearth", "--editable", ".[dev]")
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
    environment.unlink()
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
    """What the existing Detectron2 was compiled against: pip must not put others before these."""
    versions = []
    for name in ("torch", "torchvision", "numpy"):
        script = f"from importlib.metadata import version; print(version({name!r}))"
        with contextlib.suppress(subprocess.CalledProcessError):  # raised where it is missing
            versions.append(f"{name}=={output(environment.python, '-c', script)}")
    return versions


def is_complete(package: metadata.Distribution) -> bool:
    """Did pip finish installing it? INSTALLER is written once all of its files are there."""
    if package.read_text("INSTALLER") is None:
        return False
    rows = csv.reader((package.read_text("RECORD") or "").splitlines())
    files = (row[0] for row in rows if row and not row[0].endswith(".pyc"))
    return all(os.path.exists(str(package.locate_file(file))) for file in files)


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
