import pytest
import torch
from detectron2.engine import TrainerBase
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.engine.hooks import BlockWeightsHook


class IdleTrainer(TrainerBase):
    def run_step(self):
        pass


def train(model, iterations, **options):
    """What is in the event storage afterwards: name to (value, iteration) pairs."""
    trainer = IdleTrainer()
    trainer.register_hooks([BlockWeightsHook(model, **options)])
    trainer.train(0, iterations)
    return {name: h.values() for name, h in trainer.storage.histories().items()}


def test_weights_of_every_block_by_its_full_name():
    model = nn.ModuleDict({"res4": NonLocalBlock(8), "head": NonLocalBlock(8, norm="")})
    nn.init.constant_(model["res4"].norm.weight, -0.5)
    nn.init.constant_(model["head"].out.weight, 2)
    scalars = train(model, 20)
    assert set(scalars) == {
        "nonlocal/res4/out_weight_norm",
        "nonlocal/res4/mean_abs_gamma",
        "nonlocal/head/out_weight_norm",  # and no gamma, as it has no norm
    }
    ((gamma, _),) = scalars["nonlocal/res4/mean_abs_gamma"]
    ((norm, _),) = scalars["nonlocal/head/out_weight_norm"]
    assert gamma == 0.5
    assert norm == pytest.approx((2**2 * 4 * 8) ** 0.5)
    ((norm, _),) = scalars["nonlocal/res4/out_weight_norm"]
    assert norm == pytest.approx(torch.linalg.vector_norm(model["res4"].out.weight).item())


@pytest.mark.parametrize(
    ("options", "expected"), [({}, [19, 39, 44]), ({"period": 15}, [14, 29, 44])]
)
def test_every_so_many_iterations_and_at_the_last(options, expected):
    scalars = train(nn.ModuleDict({"block": NonLocalBlock(8)}), 45, **options)
    for values in scalars.values():
        assert [iteration for _, iteration in values] == expected


def warnings_of(caplog, model, iterations):
    caplog.clear()
    train(model, iterations)
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_warns_once_of_a_block_that_is_still_the_identity(caplog):
    block = NonLocalBlock(8)
    model = nn.ModuleDict({"res4": block})
    (warning,) = warnings_of(caplog, model, 40)
    assert warning.startswith("res4 is still nearly the identity after 4 of 40 iterations")
    assert "MODEL.NONLOCAL.GAMMA_LR_FACTOR 100.0" in warning
    nn.init.constant_(block.norm.weight, 0.02)
    assert not warnings_of(caplog, model, 40)
    nn.init.zeros_(block.out.weight)
    (warning,) = warnings_of(caplog, model, 40)
    assert "W_z is 0. Is it in a frozen stage" in warning


def test_model_without_blocks_writes_nothing():
    assert train(nn.Conv2d(8, 8, 1), 20) == {}
