"""What any trainer's first step says of the blocks, and what is wrong with them."""

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from detectron2.solver import build_optimizer
from torch import nn

from nl_detectron import insert_nonlocal_blocks, use_nonlocal_backbone
from nl_detectron.engine import scale_block_lr


def config(*overrides):
    cfg = get_cfg()
    use_nonlocal_backbone(cfg)
    cfg.MODEL.NONLOCAL.BACKBONE = "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.merge_from_list(list(overrides))
    return cfg


def step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)

    def said(model, optimizer=None):
        """What one step and a second say; by default an optimizer of what is trainable."""
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer or torch.optim.SGD(trainable or [nn.Parameter(torch.ones(1))], 0.1)
        caplog.clear()
        for _ in range(2):
            step(model, optimizer)
        lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
        return lines, [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    return said


def test_one_line_for_blocks_that_are_trained(said):
    model = build_backbone(config("MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE", [[], [0], [-2], []]))
    lines, warnings = said(model)
    assert lines == [
        "Blocks in ResNet: NonLocalBlock res3.nonlocal0 (128 channels), "
        "NonLocalBlock res4.nonlocal0 (256 channels): trainable, in the optimizer (SGD)"
    ]
    assert not warnings
    assert said(model) == ([], [])


def test_both_kinds_of_places_share_a_line(said):
    (line,), warnings = said(build_backbone(config("MODEL.NONLOCAL.AFTER_MODULES", ["res3.1"])))
    assert line == (
        "Blocks in ResNet: NonLocalBlock res4.nonlocal0 (256 channels), "
        "NonLocalBlock res3.1.nonlocal (128 channels): trainable, in the optimizer (SGD)"
    )
    assert not warnings


CONVERSIONS = [nn.SyncBatchNorm.convert_sync_batchnorm, FrozenBatchNorm2d.convert_frozen_batchnorm]


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_block_behind_a_norm_that_was_converted(convert, said):
    cfg = config("MODEL.RESNETS.NORM", "BN", "MODEL.NONLOCAL.NORM", "")
    cfg.MODEL.NONLOCAL.AFTER_MODULES = ["res3.1.conv2.norm"]
    (line,), (warning,) = said(convert(build_backbone(cfg)))
    assert "res4.nonlocal0 (256 channels): trainable" in line
    assert "res3" not in line
    assert warning.startswith("res3.1.conv2.norm.nonlocal is not applied any more: ")


def test_it_stays_with_the_model_that_is_trained(said):
    """A teacher, whose weights another model gives, is in no optimizer on purpose."""
    teacher, student = build_backbone(config()), build_backbone(config())
    copies = [copy.deepcopy(student), pickle.loads(pickle.dumps(student))]
    lines, warnings = said(student)
    assert (len(lines), warnings) == (1, [])
    for other in copies:
        assert said(other) == ([], [])
    del teacher


def test_blocks_that_came_after_the_optimizer(said):
    model = build_backbone(config("MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE", []))
    optimizer = torch.optim.AdamW(model.parameters())
    insert_nonlocal_blocks(model, {"res4": [0]})
    lines, (warning,) = said(model, optimizer)
    assert "res4.nonlocal0 (256 channels): trainable, not in the optimizer (AdamW)" in lines[0]
    assert warning.startswith("res4.nonlocal0 is not in the optimizer and will not learn: ")


@pytest.mark.parametrize("mode", [True, False])
def test_batch_norm_of_a_frozen_block_that_moves(mode, said):
    model = build_backbone(config("MODEL.BACKBONE.FREEZE_AT", 0)).requires_grad_(False)
    model.train(mode)
    lines, warnings = said(model)
    assert "frozen, not in the optimizer" in lines[0]
    assert ["its batch norm still moves" in warning for warning in warnings] == [True] * mode


def test_a_block_in_a_frozen_stage_is_only_said_to_be_frozen(said):
    overrides = ["MODEL.BACKBONE.FREEZE_AT", 4]
    lines, warnings = said(build_backbone(config(*overrides)))
    assert "frozen, not in the optimizer" in lines[0]
    assert not warnings


@pytest.mark.parametrize("layer", ["norm", "out"])
def test_a_gamma_of_zero_that_became_a_buffer(layer, said):
    model = build_backbone(config("MODEL.NONLOCAL.ZERO_INIT_LAYER", layer))
    model = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    _, warnings = said(model)
    assert ["will never learn: its gamma is 0" in w for w in warnings] == [True] * (layer == "norm")


@pytest.mark.parametrize("key", ["GAMMA_LR_FACTOR", "LR_FACTOR"])
@pytest.mark.parametrize("is_applied", [True, False])
def test_learning_rates_that_nobody_applies(key, is_applied, said):
    cfg = config(f"MODEL.NONLOCAL.{key}", 10.0)
    model = build_backbone(cfg)
    optimizer = build_optimizer(cfg, model)
    if is_applied:
        node = cfg.MODEL.NONLOCAL
        groups = scale_block_lr(optimizer.param_groups, model, node.GAMMA_LR_FACTOR, node.LR_FACTOR)
        optimizer.param_groups = groups
    _, warnings = said(model, optimizer)
    expected = f"MODEL.NONLOCAL.{key} is 10, but this trainer does not apply it"
    assert [w.startswith(expected) for w in warnings] == [True] * (not is_applied)


@pytest.mark.parametrize("logs", [True, False])
def test_it_is_said_where_the_trainer_logs_or_else_on_the_screen(logs, tmp_path):
    script = f"""
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from detectron2.utils.logger import setup_logger
from nl_detectron import insert_nonlocal_blocks
if {logs}:
    setup_logger({str(tmp_path)!r})
stage = ResNet.make_stage(BottleneckBlock, 2, in_channels=64, out_channels=64,
                          bottleneck_channels=16)
model = insert_nonlocal_blocks(ResNet(BasicStem(), [stage]), {{"res2": [0]}})
optimizer = torch.optim.SGD(model.parameters(), 0.1)
model(torch.zeros(1, 3, 32, 32))["res2"].sum().backward()
optimizer.step()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    line = "Blocks in ResNet: NonLocalBlock res2.nonlocal0 (64 channels): trainable, in the "
    assert done.stdout.count(line) == 1
    if logs:
        assert (tmp_path / "log.txt").read_text().count(line) == 1
