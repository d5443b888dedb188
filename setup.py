"""Metadata of nl_detectron; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Read as text: importing the package would need torch and Detectron2 at build time.
VERSION = re.search(
    r'^__version__ = "(.+)"', (ROOT / "nl_detectron" / "__init__.py").read_text(), re.MULTILINE
).group(1)

FAST_EVAL = ["faster-coco-eval>=1.6"]
ONNX = ["onnx", "onnxruntime", "onnxscript"]
SLURM = ["submitit>=1.5"]
TIMM = ["timm>=1.0"]
TOY = ["shapely"]  # draws the built-in datasets
TEST = [
    *("pytest>=7", "pytest-timeout", "pytest-xdist", "selenium"),
    *(*FAST_EVAL, *ONNX, *SLURM, *TIMM, *TOY),
]

setup(
    name="nl_detectron",
    version=VERSION,
    description="Non-local blocks for Detectron2: self-attention in its backbones and heads",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The configs lie beside the package, as in Detectron2, and are installed inside it.
    packages=[*find_packages(include=["nl_detectron", "nl_detectron.*"]), "nl_detectron.configs"],
    package_dir={"nl_detectron.configs": "configs"},
    package_data={
        "nl_detectron": ["trained.yaml"],
        "nl_detectron.configs": ["*.yaml", "**/*.yaml", "**/*.py"],
        "nl_detectron.analysis": ["*.html"],
    },
    # Detectron2 itself is missing here because it is not on the package registry.
    install_requires=[
        "torch>=2.1",
        "torchvision>=0.16",
        "numpy",
        "safetensors>=0.4",
        "tabulate",
        "tqdm",
        "matplotlib>=3.6",
        "pillow>=10.1",
        "fvcore",
        "iopath",
        "pycocotools>=2.0.6",
        "opencv-python-headless",
    ],
    extras_require={
        "toy": TOY,
        "fast-eval": FAST_EVAL,
        "onnx": ONNX,
        "slurm": SLURM,
        "timm": TIMM,
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "import-linter"],
    },
)
