"""``python -m nl_detectron``."""

from pathlib import Path

import detectron2
import torch
from detectron2.config import get_cfg

import nl_detectron
from nl_detectron import add_nonlocal_config
from nl_detectron.__main__ import describe
from tests.commands import run

LINES_ON_A_SCREEN = 50


def test_says_what_a_bug_report_needs():
    text = describe()
    for version in (nl_detectron.__version__, torch.__version__, detectron2.__version__):
        assert version in text
    for module in (nl_detectron, torch, detectron2):
        assert f"@{Path(module.__file__).parent}" in text
    for name in ("build_nonlocal_backbone", "NonLocalKeypointHead", "shapes_train", "shapes_val"):
        assert name in text
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    for key, value in cfg.MODEL.NONLOCAL.items():
        assert [f"MODEL.NONLOCAL.{key}", repr(value)] in lines


def test_runs_and_fits_on_a_screen():
    result = run("-m", "nl_detectron")
    assert result.returncode == 0
    assert result.stdout.startswith(f"nl_detectron {nl_detectron.__version__} @")
    assert len(result.stdout.splitlines()) <= LINES_ON_A_SCREEN
