"""What a run says of its progress beside what Detectron2 does."""

import logging
from types import SimpleNamespace

from detectron2.engine import TrainerBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.engine.hooks import BlockWeightsHook, ProgressHook


class IdleTrainer(TrainerBase):
    data_loader = SimpleNamespace(iterations_per_epoch=4)

    def run_step(self):
        self.storage.put_scalar("total_loss", 1.5)


def lines_of(caplog, model, start, end, writers):
    caplog.set_level(logging.INFO)
    trainer = IdleTrainer()
    hooks = [ProgressHook(writers), BlockWeightsHook(model, 2), PeriodicWriter(writers, 2)]
    trainer.register_hooks(hooks)
    trainer.train(start, end)
    return [m for m in caplog.messages if "iter: " in m or m.startswith("Iteration")]


def test_epochs_blocks_and_the_first_iteration(caplog):
    model = nn.ModuleDict({"a": NonLocalBlock(8), "b": NonLocalBlock(8, norm="")})
    nn.init.constant_(model["a"].norm.weight, -0.5)
    for block in model.values():
        nn.init.constant_(block.out.weight, 0.25)
    first, *lines = lines_of(caplog, model, 0, 6, [CommonMetricPrinter(6)])
    assert first.startswith("Iteration 1 of 6 took ")
    assert "training ends in 0:00:0" in first
    # Of two blocks one has gamma; ||W_z|| of 8 x 4 values is sqrt(2).
    ends = ["epoch: 0.50", "epoch: 1.00", "epoch: 1.50"]
    assert [line.partition("epoch")[1:] for line in lines] == [
        ("epoch", f"{end.removeprefix('epoch')}  |gamma|: 0.5  ||W_z||: 1.4") for end in ends
    ]
    assert all("total_loss: 1.5" in line for line in lines)


def test_a_resumed_run_without_blocks(caplog):
    first, line = lines_of(caplog, nn.Module(), 3, 6, [CommonMetricPrinter(6)])[:2]
    assert first.startswith("Iteration 4 of 6 took ")
    assert line.endswith("epoch: 1.00")


def test_other_writers_alone_say_nothing(caplog):
    class Silent(EventWriter):
        def write(self):
            pass

    assert lines_of(caplog, nn.Module(), 0, 2, [Silent()]) == []
