"""Weights of every kind into a model: what loads, and the one line that says why not."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nl_detectron import NonLocalBlock
from nl_detectron.engine import NonLocalCheckpointer
from nl_detectron.weights.checkpoint_io import CheckpointError, load_checkpoint, save_checkpoint
from tests.weights.test_checkpoint_io import write

SUFFIXES = (".pth", ".legacy.pth", ".pkl")


def model(wrap=None, seed=0):
    torch.manual_seed(seed)
    stage = nn.Sequential(nn.Conv2d(4, 4, 1), NonLocalBlock(4, zero_init=False))
    if wrap:
        stage[1] = wrap(stage[1])
    return nn.Sequential(stage, nn.BatchNorm2d(4))


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def same(one, other):
    return all(map(torch.equal, tensors(one), tensors(other)))


def refusal(path, module=None):
    with pytest.raises(CheckpointError) as error:
        NonLocalCheckpointer(module or model()).load(str(path))
    (line,) = str(error.value).splitlines()
    assert str(path) in line
    return line


WRAPPERS = {
    "plain": None,
    "compiled": torch.compile,
    "checkpointed": checkpoint_wrapper,
    "both": lambda module: torch.compile(checkpoint_wrapper(module)),
}


@pytest.mark.parametrize(
    ("saved", "loaded", "whole"),
    [*((one, two, False) for one in WRAPPERS for two in WRAPPERS), ("both", "plain", True)],
)
def test_wrapped_modules_have_plain_names_in_files(saved, loaded, whole, tmp_path):
    first, second = model(WRAPPERS[saved]), model(WRAPPERS[loaded], seed=1)
    names = [name for name, _ in second.named_modules()]
    NonLocalCheckpointer(torch.compile(first) if whole else first, str(tmp_path)).save("m")
    assert load_checkpoint(tmp_path / "m.pth")["model"].keys() == model().state_dict().keys()
    report = NonLocalCheckpointer(second, strict=True)
    report.load(str(tmp_path / "m.pth"))
    assert same(first, second)
    assert [name for name, _ in second.named_modules()] == names  # still wrapped


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_with_names_of_wrappers(prefix, suffix, tmp_path):
    trained, compiled = model(), model(torch.compile)
    weights = {f"{prefix}{name}": t for name, t in compiled.state_dict().items()}
    content = {"model": weights, "__author__": "x"}
    if suffix == ".pkl":
        content["model"] = {name: t.numpy() for name, t in weights.items()}
    NonLocalCheckpointer(trained, strict=True).load(str(write(content, tmp_path / f"m{suffix}")))
    assert same(trained, compiled)


def containers(weights):
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{n}": t for n, t in weights.items()}}
    return {
        "bare": weights,
        "bare, with more": {**weights, "epoch": 3, "lr": np.float64(0.1), "log": ["a"]},
        "mmengine": {"meta": {"epoch": 1}, "state_dict": weights, "ema_state_dict": averaged},
        "averaged": {"ema_state_dict": averaged},
        "averaged, bare": averaged,
        "deepspeed": {"module": weights, "dp_world_size": 8},
        "parameters": {"model": {n: nn.Parameter(t, False) for n, t in weights.items()}},
        "arrays": {"model": {n: t.numpy() for n, t in weights.items()}},
        "scalars": {"model": {n: t.numpy()[()] for n, t in weights.items()}},
    }


@pytest.mark.parametrize("kind", containers({}))
@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth"])
def test_containers_of_other_programs(kind, suffix, tmp_path):
    trained, fresh = model(), model(seed=1)
    content = containers(trained.state_dict())[kind]
    NonLocalCheckpointer(fresh).load(str(write(content, tmp_path / f"m{suffix}")))
    assert same(fresh, trained)


@pytest.mark.parametrize(
    "dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"]
)
@pytest.mark.parametrize("suffix", [*SUFFIXES, ".safetensors"])
def test_weights_of_every_type(dtype, suffix, tmp_path):
    if not hasattr(torch, dtype):
        pytest.skip("this PyTorch has no such type")
    trained, fresh = model(), model(seed=1)
    weights = {
        name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t
        for name, t in trained.state_dict().items()
    }
    path = tmp_path / f"m{suffix}"
    save_checkpoint(weights, path)
    if dtype == "complex64":
        assert " is complex" in refusal(path)
        return
    NonLocalCheckpointer(fresh, strict=True).load(str(path))
    expected = model()
    expected.load_state_dict({name: t.to(torch.float32) for name, t in weights.items()})
    assert same(fresh, expected)


@pytest.mark.parametrize("content", [{"model": model()}, model(), {"ema": model()}, [1]])
def test_whole_models_are_named(content, tmp_path):
    path = tmp_path / "m.pth"
    torch.save(content, path)
    expected = "holds a list" if content == [1] else "torch.nn.modules.container.Sequential"
    assert expected in refusal(path)


class Trainer:
    def __init__(self):
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)

    def state_dict(self):
        return {"iteration": 3, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])


STATES = [
    *(5, None, "x", [], [1], torch.ones(2), np.ones(2)),
    *({"iteration": value} for value in (2**62, -1, 1.5, "3", None, True, [3], torch.tensor(3))),
    *({"iteration": 7, "optimizer": value} for value in (None, 5, [], {}, {"state": 1})),
    {"iteration": 7, "optimizer": {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}},
]


@pytest.mark.parametrize("state", STATES, ids=str)
def test_trainer_states_of_the_wrong_types(state, tmp_path):
    """The last sound checkpoint is taken, or one line says what is wrong."""
    checkpointer = NonLocalCheckpointer(model(), str(tmp_path), trainer=Trainer())
    checkpointer.save("model_0000003")
    torch.save({"model": model().state_dict(), "trainer": state}, tmp_path / "model_0000007.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    try:
        checkpointer.resume_or_load("", resume=True)
    except CheckpointError as error:
        (line,) = str(error).splitlines()
        assert "model_0000007.pth" in line
        return
    assert "model_0000007.pth has no sound state of a trainer" in checkpointer.note
    assert checkpointer.checkpointables["trainer"].iteration == 3


def test_pickles_and_files_of_pytorch_are_told_apart_by_content(tmp_path):
    weights = {"a.weight": torch.ones(2)}
    torch.save({"model": weights}, tmp_path / "zipped.pkl")
    arrays = {"model": {"a.weight": np.ones(2)}}
    (tmp_path / "pickled.pth").write_bytes(pickle.dumps(arrays))
    for name in ("zipped.pkl", "pickled.pth"):
        assert load_checkpoint(tmp_path / name)["model"]["a.weight"].tolist() == [1, 1]
