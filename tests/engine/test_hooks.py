import math

import pytest
import torch
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import EvalHook
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.engine.hooks import BestCheckpointHook, BlockWeightsHook


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


def warnings_of(caplog, model, iterations, **options):
    caplog.clear()
    train(model, iterations, **options)
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def block_with(gamma, w_z):
    block = NonLocalBlock(8)
    nn.init.constant_(block.norm.weight, gamma)
    nn.init.constant_(block.out.weight, w_z)
    return block


@pytest.mark.parametrize(
    ("gamma", "w_z", "is_frozen", "options", "ending"),
    [
        (0, 1, False, {}, "|gamma| is 0: a higher MODEL.NONLOCAL.GAMMA_LR_FACTOR (such as 100.0)"),
        (0.009, 1, False, {}, "|gamma| is 0.009: a higher MODEL.NONLOCAL.GAMMA_LR_FACTOR"),
        (0, 1, False, {"gamma_lr_factor": 100.0}, "|gamma| is 0: see docs/STUDY.md"),
        (0, 1, True, {}, "|gamma| is 0: it is frozen, as its stage is"),
        (1, 0, False, {}, "as W_z is 0: a higher MODEL.NONLOCAL.LR_FACTOR"),
        (1, 0, False, {"lr_factor": 10.0}, "as W_z is 0: see docs/STUDY.md"),
        (1, 0, True, {}, "as W_z is 0: it is frozen, as its stage is"),
        (0.02, 1, False, {}, None),
        (0.02, 1, True, {}, None),
    ],
)
def test_warns_once_of_a_block_that_is_still_the_identity(
    gamma, w_z, is_frozen, options, ending, caplog
):
    model = nn.ModuleDict({"res4": block_with(gamma, w_z).requires_grad_(not is_frozen)})
    warnings = warnings_of(caplog, model, 1000, warmup_iters=100, **options)
    assert len(warnings) == (ending is not None)
    for warning in warnings:
        assert warning.startswith("res4 is still nearly the identity after 600 of 1000 iterations")
        assert ending in warning


@pytest.mark.parametrize(
    ("iterations", "warmup_iters", "moment"),
    [
        *((40, 0, None), (499, 0, None), (500, 0, 500), (600, 101, None), (600, 100, 600)),
        *((6000, 0, 600), (6000, 700, 1200)),
    ],
)
def test_a_run_too_short_to_tell_warns_of_nothing(iterations, warmup_iters, moment, caplog):
    model = nn.ModuleDict({"res4": block_with(0, 1)})
    warnings = warnings_of(caplog, model, iterations, warmup_iters=warmup_iters)
    assert [f"after {moment} of" in warning for warning in warnings] == [True] * (
        moment is not None
    )


def test_model_without_blocks_writes_nothing():
    assert train(nn.Conv2d(8, 8, 1), 20) == {}


class CountingTrainer(TrainerBase):
    """The weight of its model is the number of the iteration; its APs are what they should be."""

    def __init__(self, folder, aps):
        super().__init__()
        self.model = nn.Linear(1, 1)
        evaluate = EvalHook(1, lambda: {"bbox": {"AP": aps[self.iter]}} if aps else {})
        best = BestCheckpointHook(1, self.model, str(folder), "bbox/AP")
        self.register_hooks([evaluate, best])

    def run_step(self):
        nn.init.constant_(self.model.weight, self.iter)


def best_iteration(folder):
    checkpoint = torch.load(folder / "model_best.pth")
    assert "trainer" not in checkpoint
    return int(checkpoint["model"]["weight"])


@pytest.mark.parametrize(
    ("aps", "expected"),
    [
        ([10, 30, 20, None, 5], 1),
        ([10, 30, 20, None, 40], 3),  # the last evaluation is after the last iteration
        ([math.nan, 30, math.nan, None, 30], 1),
    ],
)
def test_weights_of_the_best_evaluation_are_kept(aps, expected, tmp_path):
    CountingTrainer(tmp_path, aps).train(0, 4)
    assert best_iteration(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == [
        "model_best.pth"
    ]  # and no last_checkpoint


@pytest.mark.parametrize(("aps", "expected"), [([None] * 3 + [20, 25], 1), ([0] * 3 + [31, 5], 3)])
def test_a_resumed_run_knows_the_best_evaluation(aps, expected, tmp_path):
    first = CountingTrainer(tmp_path, [10, 30, None, 20])
    first.train(0, 3)
    resumed = CountingTrainer(tmp_path, [*aps, 0])
    resumed.load_state_dict(first.state_dict())
    resumed.train(3, 5)
    assert best_iteration(tmp_path) == expected


def test_best_evaluation_counts_when_it_is_written(tmp_path, monkeypatch):
    """A signal while the file is written saves the run, and ends it."""
    trainer = CountingTrainer(tmp_path, [10, 20, 30])
    saved = {}

    def interrupted(*args, **kwargs):
        saved.update(trainer.state_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr("fvcore.common.checkpoint.Checkpointer.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(0, 2)
    assert "hooks" not in saved


def test_no_best_checkpoint_without_results(tmp_path):
    CountingTrainer(tmp_path, []).train(0, 3)
    assert not list(tmp_path.iterdir())
