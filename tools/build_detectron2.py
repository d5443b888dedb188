#!/usr/bin/env python3
"""Build a pure-Python wheel of Detectron2 v0.6 that runs on today's PyTorch, NumPy and Pillow.

Detectron2 is not on the package registry under its own name, and its GitHub source needs a C++
compiler. The registry does hold v0.6's source archive (as pb1-detectron2). This tool fetches it,
checks its hash, applies the patches listed below, adds a substitute for the module of compiled
operations and lets pip and setuptools build detectron2-0.6-py3-none-any.whl.

Everything except the compiled operations works: rotated boxes, deformable convolution and the C++
COCO evaluation (pycocotools evaluates instead) need a Detectron2 compiled from its source.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ARCHIVE_REQUIREMENT = "pb1-detectron2==0.6"
ARCHIVE_NAME = "pb1-detectron2-0.6.tar.gz"
ARCHIVE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
WHEEL_NAME = "detectron2-0.6-py3-none-any.whl"
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "build" / "detectron2"

# The dependencies are what Detectron2's main branch asks for today, except that iopath 0.1.10 is
# allowed: v0.6's pins (black==21.4b2, future, pydot) no longer install or are no longer used.
OLDEST_SETUPTOOLS = 77  # names licences as this does
PYPROJECT = f"""\
[build-system]
requires = ["setuptools>={OLDEST_SETUPTOOLS}"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "0.6"
description = "Detectron2 v0.6 without its compiled operations, for current libraries"
authors = [{{name = "FAIR"}}]
license = "Apache-2.0"
urls = {{Homepage = "https://github.com/facebookresearch/detectron2"}}
requires-python = ">=3.7"
dependencies = [
    "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8", "tabulate",
    "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6", "iopath>=0.1.7,<0.2",
    "omegaconf>=2.1,<2.4", "hydra-core>=1.1", "black", "packaging",
]

[tool.setuptools]
packages.find = {{include = ["detectron2*"], namespaces = false}}
package-data = {{"detectron2.model_zoo" = ["configs/**/*.yaml", "configs/**/*.py"]}}
"""

# Small projects that Detectron2's own setup.py installs as part of the package.
PROJECTS = ("PointRend/point_rend", "DeepLab/deeplab", "Panoptic-DeepLab/panoptic_deeplab")


class BuildError(Exception):
    """The wheel cannot be built; the message says what is wrong and what to do."""


class Patch(NamedTuple):
    """Replace `old`, which `file` of the package holds exactly `times` times, with `new`."""

    file: str
    old: str
    new: str
    reason: str
    times: int = 1


NUMPY = "NumPy 1.24 removed its aliases of the builtin types"
COPY = "NumPy 2 raises where copy=False cannot be kept"
PILLOW = "Pillow 10 removed the alias"
PYCOCOTOOLS = "the C++ evaluation is not compiled; pycocotools computes the same AP"
PKG_RESOURCES = "setuptools removed pkg_resources"
SCHEDULER = "torch 2's schedulers are LRSchedulers: their state was silently not saved"
MESHGRID = "torch warns when `indexing` is not given"
MISSING_OPERATION = "the error of a missing operation should say how to get it"

PATCHES = (
    Patch("data/build.py", "dtype=np.int", "dtype=int", NUMPY, 2),
    Patch("data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)", NUMPY),
    Patch("evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", NUMPY, 2),
    Patch("evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", NUMPY, 2),
    Patch("evaluation/sem_seg_evaluation.py", "np.float)", "float)", NUMPY, 5),
    Patch("layers/mask_ops.py", "np.array(mask, copy=False)", "np.asarray(mask)", COPY),
    Patch("structures/masks.py", "np.bool)", "bool)", NUMPY, 3),
    Patch("utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)", NUMPY),
    Patch("utils/visualizer.py", "astype(np.bool)", "astype(bool)", NUMPY, 3),
    Patch("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR", PILLOW),
    Patch(
        "data/common.py",
        "self._rng.sample(self._fallback_candidates, k=1)",
        "self._rng.sample(tuple(self._fallback_candidates), k=1)",
        "Python 3.11 no longer samples from a set",
    ),
    Patch("engine/hooks.py", "lr_scheduler._LRScheduler", "lr_scheduler.LRScheduler", SCHEDULER, 2),
    Patch(
        "modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        MESHGRID,
    ),
    Patch(
        "projects/panoptic_deeplab/post_processing.py",
        "        torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n",
        "        torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n"
        '        indexing="ij",\n',
        MESHGRID,
    ),
    Patch(
        "export/__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:  # without caffe2\n    pass\n",
        "torch no longer has caffe2, which took TracingAdapter and scripting down with it",
    ),
    Patch("model_zoo/model_zoo.py", "import pkg_resources\n", "", PKG_RESOURCES),
    Patch(
        "model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )",
        'os.path.join(os.path.dirname(__file__), "configs", config_path)',
        PKG_RESOURCES,
    ),
    Patch(
        "evaluation/fast_eval_api.py",
        "\n\n\nclass COCOeval_opt(COCOeval):",
        "\n\nCOCOeval_opt = COCOeval\n\n\nclass _CompiledCOCOeval(COCOeval):",
        PYCOCOTOOLS,
    ),
    Patch("evaluation/coco_evaluation.py", "_impl = use_fast_impl", "_impl = False", PYCOCOTOOLS),
    Patch(
        "layers/nms.py",
        "from torchvision.ops import nms  # BC-compat\n",
        "from torchvision.ops import nms  # BC-compat\n\nfrom detectron2 import _C\n",
        MISSING_OPERATION,
    ),
    Patch(
        "layers/nms.py", "torch.ops.detectron2.nms_rotated(", "_C.nms_rotated(", MISSING_OPERATION
    ),
    Patch(
        "utils/collect_env.py",
        "        # print compilers that are used to build extension\n"
        '        data.append(("Compiler", _C.get_compiler_version()))\n'
        '        data.append(("CUDA compiler", _C.get_cuda_version()))  # cuda or hip\n'
        '        if has_cuda and getattr(_C, "has_cuda", lambda: True)():\n'
        "            data.append(\n"
        '                ("detectron2 arch flags", '
        "detect_compute_compatibility(CUDA_HOME, _C.__file__))\n"
        "            )\n",
        '        data.append(("detectron2._C", "not compiled"))\n',
        "the substitute can be imported but has no compiler to report",
    ),
)

SUBSTITUTE = '''\
"""Stands in for Detectron2's compiled operations, which this pure-Python build does not have."""

_OPERATIONS = """
COCOevalAccumulate COCOevalEvaluateImages ImageEvaluation InstanceAnnotation box_iou_rotated
deform_conv_backward_filter deform_conv_backward_input deform_conv_forward get_compiler_version
get_cuda_version has_cuda modulated_deform_conv_backward modulated_deform_conv_forward nms_rotated
roi_align_rotated_backward roi_align_rotated_forward
""".split()


def __getattr__(name):
    # Only the operations raise ImportError: pickle, inspect and doctest look for all kinds of
    # names in every module and expect AttributeError.
    if name not in _OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise ImportError(
        f"{__name__}.{name} is a compiled operation, and this is a pure-Python build of "
        "Detectron2. To have it, compile Detectron2 from its source: "
        "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git"
    )
'''


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = "where the archive is kept and the wheel is put (default: build/detectron2)"
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help=where)
    what = "also install the wheel with pip; a Detectron2 that is already there is left alone"
    parser.add_argument("--install", action="store_true", help=what)
    options = parser.parse_args(arguments)
    try:
        if options.install:
            build_and_install(options.output)
        else:
            print(build(options.output))
    except BuildError as error:
        sys.exit(f"{Path(__file__).name}: {error}")


def build_and_install(output: Path) -> None:
    """Install the wheel into the running Python, unless that has a Detectron2 of its own."""
    package = installed_package()
    if package and not is_our_build(package):
        print(f"Detectron2 is already installed in {package}: it is used as it is.")
        return
    wheel = build(output)
    # A wheel of the same version only replaces an older build of ours when it is forced to.
    replace = ["--force-reinstall", "--no-deps"] if package else []
    run_module("pip", "install", "--quiet", *replace, str(wheel))
    print(f"Detectron2 0.6 (pure Python) is installed in {sys.prefix}.")


def installed_package() -> Path | None:
    spec = importlib.util.find_spec("detectron2")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def is_our_build(package: Path) -> bool:
    """Is it this tool's wheel, installed in this very environment?"""
    return (package / "_C.py").is_file() and Path(sys.prefix).resolve() in package.parents


def build(output: Path) -> Path:
    """Return the wheel in `output`, made first if it is not there or older than this file."""
    wheel = output / WHEEL_NAME
    if wheel.is_file() and wheel.stat().st_mtime >= Path(__file__).stat().st_mtime:
        return wheel
    output.mkdir(parents=True, exist_ok=True)
    archive = output / ARCHIVE_NAME
    if not archive.is_file():
        download(archive)
    check_hash(archive)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        shutil.unpack_archive(archive, scratch)
        tree = Path(scratch, ARCHIVE_NAME[: -len(".tar.gz")])
        prepare(tree)
        # Without a setuptools that is new enough, pip fetches one for the build alone.
        isolation = ["--no-build-isolation"] if has_setuptools() else []
        run_module("pip", "wheel", "--no-deps", *isolation, "--wheel-dir", scratch, str(tree))
        # In one step, so that an interrupted build leaves no incomplete wheel.
        os.replace(Path(scratch, WHEEL_NAME), wheel)
    return wheel


def download(archive: Path) -> None:
    """Fetch the source archive from the registry that pip is configured to use.

    `pip download` runs the archive's setup.py, which fails: it needs torch and gives another name
    than the archive's. unearth only downloads.
    """
    if importlib.util.find_spec("unearth") is None:
        raise BuildError(
            f"the package 'unearth' fetches {ARCHIVE_REQUIREMENT} and is not installed: "
            f"run '{sys.executable} -m pip install unearth'"
        )
    config = pip_config()
    command = ["unearth", ARCHIVE_REQUIREMENT, "--no-binary"]
    if config.get("index-url"):  # without one, unearth's default is the same as pip's
        for url in (config["index-url"] + " " + config.get("extra-index-url", "")).split():
            command += ["--index-url", url]
    for host in config.get("trusted-host", "").split():
        command += ["--trusted-host", host]
    environment = dict(os.environ)
    if config.get("cert"):
        environment.setdefault("SSL_CERT_FILE", config["cert"])
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        run_module(*command, "--download", scratch, env=environment)
        downloaded = Path(scratch, ARCHIVE_NAME)
        if not downloaded.is_file():
            raise BuildError(f"unearth downloaded no {ARCHIVE_NAME} for {ARCHIVE_REQUIREMENT}")
        os.replace(downloaded, archive)


def pip_config() -> dict[str, str]:
    """pip's settings for installing, by option name; its own order of precedence applies."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    settings = dict(line.split("=", 1) for line in listing.splitlines() if "=" in line)
    return {
        key.split(".", 1)[1]: ast.literal_eval(value)
        for section in ("global.", "install.", ":env:.")
        for key, value in settings.items()
        if key.startswith(section)
    }


def check_hash(archive: Path) -> None:
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != ARCHIVE_SHA256:
        raise BuildError(
            f"{archive} has the SHA-256 {actual}, not {ARCHIVE_SHA256}: "
            "it is not the archive this tool knows. Delete it and try again."
        )


def prepare(tree: Path) -> None:
    """Make the unpacked source archive one that setuptools packs as it is needed here."""
    package = tree / "detectron2"
    (tree / "setup.py").unlink()
    (tree / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    for project in PROJECTS:
        folder = tree / "projects" / project
        folder.rename(package / "projects" / folder.name)
    apply_patches(package, PATCHES)
    (package / "_C.py").write_text(SUBSTITUTE, encoding="utf-8")


def apply_patches(package: Path, patches: tuple[Patch, ...]) -> None:
    for file, old, new, reason, times in patches:
        path = package / file
        if not path.is_file():
            raise BuildError(f"{file}, which has to be patched ({reason}), does not exist")
        text = path.read_text(encoding="utf-8")
        if text.count(old) != times:
            raise BuildError(
                f"{file} holds {old!r} {text.count(old)} times, not {times}: "
                f"its patch ({reason}) no longer applies and has to be revised"
            )
        path.write_text(text.replace(old, new), encoding="utf-8")


def has_setuptools() -> bool:
    """Can the setuptools of this Python read PYPROJECT?"""
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= OLDEST_SETUPTOOLS
    except metadata.PackageNotFoundError:
        return False


def run_module(module: str, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run a module of this Python as a command, whose output only matters when it fails."""
    command = (sys.executable, "-m", module, *arguments)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, check=False
    )
    if done.returncode:
        raise BuildError(f"'{' '.join(command)}' failed:\n{done.stdout}")


if __name__ == "__main__":
    main()
