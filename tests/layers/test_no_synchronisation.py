"""
Nothing in the forward or backward pass on CUDA waits for the GPU, copies from or to it, or has a
shape that depends on what was computed there. Tensors without data show it on any machine: fake
ones, which have a CUDA device, but through which autograd does not go back without a GPU, and those
of the meta device, through which it does.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nl_detectron import GlobalContextBlock, NonLocalBlock
from nl_detectron.layers import PAIRWISE, SUBSAMPLE, softmax
from nl_detectron.layers.average import _SoftmaxAverage
from nl_detectron.layers.ramp import _RampSum
from nl_detectron.layers.softmax import SDPA, TILES, SoftmaxPlan, _TiledSoftmax

PLANS = {
    "sdpa": SoftmaxPlan(SDPA),
    "tiles": SoftmaxPlan(TILES, max_pairs=2**22),
    "kept": SoftmaxPlan(TILES, keep=True),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [
    *({"pairwise": f, "subsample": s} for f, s in itertools.product(PAIRWISE, SUBSAMPLE)),
    None,
]


class OneDevice(TorchDispatchMode):
    """
    Raises an error at a copy from or to another device. That of a tensor's value, as in ``.item()``
    and ``if``, and shapes that depend on it are errors of tensors without data already.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor) and t.dim()]
        assert {t.device.type for t in tensors} <= {self.device}, f"{func} leaves {self.device}"
        return result


def make_block(options, device):
    with torch.device(device):
        if options is None:
            return GlobalContextBlock(64)
        return NonLocalBlock(64, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["sdpa", "tiles"])
@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_forward_and_backward(options, plan, dtype, monkeypatch):
    monkeypatch.setattr(softmax, "choose", lambda *args: PLANS[plan])
    block = make_block(options, "meta").to(dtype)
    x = torch.randn(2, 64, 60, 50, device="meta", dtype=dtype, requires_grad=True)
    with OneDevice("meta"):
        gradients = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    assert [g.shape for g in gradients] == [t.shape for t in (x, *block.parameters())]


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_forward_on_cuda(options, autocast, monkeypatch):
    if autocast and not torch.cuda.is_available():  # autocast would be disabled
        monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args: True)
    with FakeTensorMode():
        block = make_block(options, "cuda")
        x = torch.randn(2, 64, 60, 50, device="cuda", requires_grad=True)
        first = block.context if options is None else block.g
        dtypes = []
        first.register_forward_hook(lambda module, args, result: dtypes.append(result.dtype))
        with OneDevice("cuda"), torch.autocast("cuda", autocast, enabled=autocast is not None):
            z = block(x)
    assert (z.shape, z.device.type, z.dtype) == (x.shape, "cuda", x.dtype)
    assert dtypes == [autocast or torch.float32]


class Context:
    """What an autograd function is given."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tiles", "kept", "ramp", "average"])
def test_our_own_backward_passes_on_cuda(name, dtype):
    with FakeTensorMode():
        theta, phi, g = (
            torch.randn(2, n, 64, device="cuda", dtype=dtype) for n in (6000, 1500, 1500)
        )
        if name == "ramp":
            function, inputs = _RampSum, [t.float() for t in (theta[..., 0], phi[..., 0], g)]
        elif name == "average":
            function, inputs = _SoftmaxAverage, [phi[..., 0], g]
        else:
            function, inputs = _TiledSoftmax, [theta, phi, g]
        others = (0.1, PLANS[name]) if name in PLANS else ()
        context = Context()
        with OneDevice("cuda"), torch.no_grad():  # as autograd calls them
            y = function.forward(context, *inputs, *others)
            gradients = function.backward(context, torch.randn_like(y))[: len(inputs)]
        assert [(t.shape, t.dtype) for t in gradients] == [(t.shape, t.dtype) for t in inputs]


def test_what_synchronises_is_seen():
    with FakeTensorMode():
        x = torch.randn(4, device="cuda")
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            x.sum().item()
        with pytest.raises(AssertionError, match="leaves cuda"), OneDevice("cuda"):
            x.cpu()
    with pytest.raises(RuntimeError, match="meta"):
        torch.randn(4, device="meta").sum().item()
