"""Learning rates of their own for non-local blocks, in configs, LazyConfigs and by hand."""

import copy
import logging

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from torch import nn

from nl_detectron import GlobalContextBlock, NonLocalBlock, model_zoo
from nl_detectron.config import build_config
from nl_detectron.engine import Trainer, get_optimizer_params, scale_block_lr

OPTIONS = [
    *("MODEL.DEVICE", "cpu", "MODEL.NONLOCAL.GAMMA_LR_FACTOR", 100.0),
    *("MODEL.NONLOCAL.LR_FACTOR", 0.5, "SOLVER.BASE_LR", 0.04),
]
CONFIG = model_zoo.get_config_file("long_range")


class OneScale(nn.Module):
    """A norm of nobody's."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.weight


def rates(model, groups):
    """Name of parameter to (learning rate, weight decay)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[p]: (group["lr"], group.get("weight_decay"))
        for group in groups
        for p in group["params"]
    }


def test_factors_of_the_config_reach_the_blocks_and_nothing_else(caplog):
    cfg = build_config(CONFIG, OPTIONS)
    model = Trainer.build_model(cfg)
    with caplog.at_level(logging.INFO):
        optimizer = Trainer.build_optimizer(cfg, model)
    assert "100 times the model's for gamma and beta (2 tensors), 0.5 times" in caplog.text
    of_parameter = rates(model, optimizer.param_groups)
    assert set(of_parameter) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, (lr, weight_decay) in of_parameter.items():
        is_norm = ".norm." in name or ".bn" in name
        if ".nonlocal" not in name:
            assert lr == 0.04
        elif is_norm:
            assert (lr, weight_decay) == (4.0, 0)
        else:
            assert (lr, weight_decay) == (0.02, cfg.SOLVER.WEIGHT_DECAY)


def test_schedule_multiplies_what_each_group_has():
    cfg = build_config(CONFIG, [*OPTIONS, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", "(1,)"])
    optimizer = Trainer.build_optimizer(cfg, Trainer.build_model(cfg))
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    before = [group["lr"] for group in optimizer.param_groups]
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * lr for lr in before])


def test_without_factors_the_optimizer_is_detectron2s():
    cfg = build_config(CONFIG, ["MODEL.DEVICE", "cpu"])
    model = Trainer.build_model(cfg)
    ours, theirs = (
        Trainer.build_optimizer(cfg, model),
        super(Trainer, Trainer).build_optimizer(cfg, model),
    )
    assert len(ours.param_groups) == len(theirs.param_groups)
    for mine, other in zip(ours.param_groups, theirs.param_groups):
        assert [id(p) for p in mine.pop("params")] == [id(p) for p in other.pop("params")]
        assert mine == other


@pytest.mark.parametrize("key", ["GAMMA_LR_FACTOR", "LR_FACTOR"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_wrong_factors_name_their_key(key, value):
    cfg = build_config(CONFIG, ["MODEL.DEVICE", "cpu", f"MODEL.NONLOCAL.{key}", value])
    model = nn.ModuleDict({"nonlocal0": NonLocalBlock(8)})
    with pytest.raises(ValueError, match=rf"^MODEL.NONLOCAL.{key} is {value}, but must be"):
        Trainer.build_optimizer(cfg, model)


@pytest.mark.parametrize("norm", ["BN", "GN", "LN", OneScale])
def test_gamma_and_beta_have_no_weight_decay_whatever_the_norm(norm):
    model = nn.Sequential(nn.Conv2d(3, 32, 1), NonLocalBlock(32, norm=norm))
    groups = [{"params": list(model.parameters()), "lr": 1.0, "weight_decay": 0.1}]
    for name, rate in rates(model, scale_block_lr(groups, model, 10, 1)).items():
        assert rate == ((10, 0) if name.startswith("1.norm.") else (1, 0.1)), name


def test_norm_inside_of_global_context_is_no_gamma():
    model = nn.Sequential(GlobalContextBlock(32))
    groups = [{"params": list(model.parameters()), "lr": 1.0}]
    assert set(rates(model, scale_block_lr(groups, model, 10, 2)).values()) == {(2, None)}


def test_lazy_config():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), NonLocalBlock(8))
    lazy = L(torch.optim.SGD)(
        params=L(get_optimizer_params)(
            base_lr="${..lr}", gamma_lr_factor=100, weight_decay_norm=0.0
        ),
        lr=0.02,
        weight_decay=1e-4,
    )
    lazy.params.model = model
    of_parameter = rates(model, instantiate(lazy).param_groups)
    assert of_parameter["1.norm.weight"] == of_parameter["1.norm.bias"] == (2, 0)
    assert {of_parameter[n] for n in of_parameter if "norm" not in n} == {(0.02, 1e-4)}


def test_an_optimizer_with_factors_is_saved_and_loaded():
    cfg = build_config(CONFIG, OPTIONS)
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    again = Trainer.build_optimizer(cfg, model)
    again.load_state_dict(state)
    assert rates(model, again.param_groups) == rates(model, optimizer.param_groups)
    assert len(again.state) == len(optimizer.state)
