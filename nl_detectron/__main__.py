"""``python -m nl_detectron`` prints what a bug report needs."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.roi_heads import ROI_KEYPOINT_HEAD_REGISTRY
from detectron2.utils.collect_env import collect_env_info
from tabulate import tabulate

import nl_detectron
from nl_detectron import model_zoo
from nl_detectron.data import register_built_in


def describe() -> str:
    """Versions and where they are from, the machine, registered names, config keys and defaults."""
    cfg = get_cfg()
    nl_detectron.add_nonlocal_config(cfg)
    settings = [(f"MODEL.NONLOCAL.{key}", repr(value)) for key, value in cfg.MODEL.NONLOCAL.items()]
    # How PyTorch itself was built fills a screen alone, and its version says it.
    environment = collect_env_info().partition("PyTorch built with")[0].rstrip()
    folder = os.environ.get("DETECTRON2_DATASETS", "datasets, as DETECTRON2_DATASETS is not set")
    names = [
        ("backbones", _own(BACKBONE_REGISTRY)),
        ("keypoint heads", _own(ROI_KEYPOINT_HEAD_REGISTRY)),
        ("configs", f"{len(model_zoo.list_configs())} (nl_detectron.model_zoo.list_configs())"),
        (f"datasets (built in, or found in {folder})", ", ".join(_datasets())),
    ]
    package = Path(nl_detectron.__file__).parent
    return "\n".join(
        [
            f"nl_detectron {nl_detectron.__version__} @{package}",
            environment,
            *(_wrap(f"{what}: {value}") for what, value in names),
            tabulate(settings, headers=("config key", "default"), tablefmt="simple"),
        ]
    )


def _own(registry: object) -> str:
    """Those names in one of Detectron2's registries that this package registers."""
    entries = ((name, entry.__module__) for name, entry in registry)  # type: ignore[attr-defined]
    return ", ".join(name for name, module in entries if module.startswith("nl_detectron."))


def _datasets() -> list[str]:
    """The registered datasets that are this package's own, or whose annotations are here."""
    register_built_in(sys.argv)
    return [
        name
        for name in sorted(DatasetCatalog.list())
        if DatasetCatalog[name].__module__.startswith("nl_detectron.")
        or Path(MetadataCatalog.get(name).get("json_file", "")).is_file()
    ]


def _wrap(text: str) -> str:
    return textwrap.fill(text, 100, subsequent_indent="    ", break_on_hyphens=False)


if __name__ == "__main__":
    print(describe())
