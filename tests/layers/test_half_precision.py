"""float16 and bfloat16 lose no more than the N x N form of the same precision does itself."""

import pytest
import torch

from nl_detectron.layers import (
    NonLocalBlock,
    concatenation_pairwise,
    dot_product_pairwise,
    softmax_pairwise,
)
from nl_detectron.layers.softmax import SDPA, TILES, SoftmaxPlan
from tests.layers import reference

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    ),
]
PLANS = {
    "tiles": SoftmaxPlan(TILES, max_queries=32),
    "kept": SoftmaxPlan(TILES, keep=True),
    "sdpa": SoftmaxPlan(SDPA),
}
HALF = [torch.float16, torch.bfloat16]


def inputs(queries=70, keys=90, d=32, c=32, magnitude=1.0, batch=2):
    torch.manual_seed(0)
    shapes = [(batch, queries, d), (batch, keys, d), (batch, keys, c)]
    return [magnitude * torch.randn(shape) for shape in shapes]


def results(function, tensors, dtype, device, grad):
    """y and the gradients, float64 on the CPU."""
    tensors = [t.to(device, dtype).requires_grad_() for t in tensors]
    y = function(*tensors)
    found = [y, *torch.autograd.grad(y, tensors, grad.to(y))]
    assert all(g.dtype == dtype for g in found[1:])
    return [t.detach().double().cpu() for t in found]


def compare(ours, n_by_n, tensors, dtype, device, grad_scale=1.0):
    """For y and each gradient: our error, and that of the N x N form."""
    tensors = [t.to(dtype) for t in tensors]  # the rounding of the inputs is nobody's error
    shape = *tensors[0].shape[:2], tensors[2].shape[2]
    grad = (grad_scale * torch.randn(shape)).to(dtype)
    expected = results(n_by_n, tensors, torch.float64, "cpu", grad)
    ours, theirs = (results(f, tensors, dtype, device, grad) for f in (ours, n_by_n))
    for actual, their, right in zip(ours, theirs, expected):
        assert actual.isfinite().all()
        yield (actual - right).norm() / right.norm(), (their - right).norm() / right.norm()


def n_by_n_softmax(scale):
    return lambda theta, phi, g: (scale * theta @ phi.mT).softmax(2) @ g


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("scale", "shape"),
    [
        (32**-0.5, {}),
        (1.0, {"d": 64}),
        (0.1, {"queries": 30, "keys": 9000, "batch": 1}),  # float16 has no 1 / 9,000 to all digits
        (0.1, {"queries": 1, "keys": 5, "d": 5, "c": 3}),
    ],
)
@pytest.mark.parametrize("grad_scale", [1.0, 1e-3, 1e3])
def test_softmax(plan, dtype, device, scale, shape, grad_scale):
    def ours(theta, phi, g):
        return softmax_pairwise(theta, phi, g, scale, PLANS[plan])

    n_by_n = n_by_n_softmax(scale)
    for our, their in compare(ours, n_by_n, inputs(**shape), dtype, device, grad_scale):
        assert our <= 3 * their + torch.finfo(dtype).eps / 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS)
def test_plans_agree_in_full_precision(plan, device):
    scale, tensors = 0.3, inputs(d=24, c=16)
    grad = torch.randn(2, 70, 16)

    def ours(*tensors):
        return softmax_pairwise(*tensors, scale, PLANS[plan])

    actual = results(ours, tensors, torch.float32, device, grad)
    expected = results(n_by_n_softmax(scale), tensors, torch.float64, "cpu", grad)
    for a, e in zip(actual, expected):
        assert (a - e).norm() <= 1e-5 * e.norm()


def n_by_n_dot_product(theta, phi, g):
    return (theta @ phi.mT / phi.shape[1]) @ g


def concatenation(function):
    """Of a function of a, b and g, that of theta, phi and g with w_f = 1 / 8."""

    def of_embeddings(theta, phi, g):
        double = theta.dtype == torch.float64
        a, b = (t.to(torch.float64 if double else torch.float32).sum(2) / 8 for t in (theta, phi))
        return function(a, b, g)

    return of_embeddings


def n_by_n_concatenation(a, b, g):
    pairs = (a.unsqueeze(2) + b.unsqueeze(1)).relu() / b.shape[1]
    return pairs.to(g.dtype) @ g


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("magnitude", [1.0, 50.0])
@pytest.mark.parametrize("kind", ["dot_product", "concatenation"])
def test_sums(kind, dtype, magnitude, device):
    """Of magnitude 50 the N x N form has infinities, ours has not."""
    ours, n_by_n = {
        "dot_product": (dot_product_pairwise, n_by_n_dot_product),
        "concatenation": (
            concatenation(concatenation_pairwise),
            concatenation(n_by_n_concatenation),
        ),
    }[kind]
    grad_scale = 1 / magnitude
    pairs = compare(ours, n_by_n, inputs(magnitude=magnitude), dtype, device, grad_scale)
    for our, their in pairs:
        assert our <= (3 * their if their.isfinite() else 0) + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", HALF)
def test_softmax_of_magnitude_50(plan, dtype, device):
    """Logits of up to 1.28e6: no infinities, and what is not a tie is right."""
    torch.manual_seed(0)
    tensors = [50 * torch.sign(torch.randn(1, n, 512)) for n in (40, 48, 48)]
    if plan == "sdpa" and device == "cpu" and dtype == torch.float16:
        pytest.skip("PyTorch's own, which the CPU does not choose, computes logits in float16")
    y, *gradients = results(
        lambda *t: softmax_pairwise(*t, 1.0, PLANS[plan]),
        tensors,
        dtype,
        device,
        torch.ones(1, 40, 512),
    )
    weights = reference.weights("embedded_gaussian", *(t.double() for t in tensors[:2]))
    right = weights @ tensors[2].double()
    assert (y - right).norm() <= 1e-2 * right.norm()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("subsample", ["none", "embeddings", "pyramid"])
@pytest.mark.parametrize("pairwise", [*reference.PAIRWISE, "disentangled"])
def test_blocks_under_autocast(pairwise, subsample):
    """Folded or not, what they add and all gradients, of x in float32 as a backbone gives it."""
    torch.manual_seed(0)
    block = NonLocalBlock(128, pairwise=pairwise, subsample=subsample, norm="", temperature=0.5)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 128, 28, 36) * (0.3 if pairwise == "gaussian" else 1)
    grad = torch.randn(x.shape)
    names, parameters = zip(*block.named_parameters())

    def n_by_n(x, *tensors):
        tensors = dict(zip(names, tensors))
        return reference.block(x, tensors, pairwise, subsample, True, block.temperature) - x

    def ours(x, *tensors):
        return torch.func.functional_call(block, dict(zip(names, tensors)), (x,)) - x

    def run(function, dtype, enabled):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = function(*inputs)
        found = torch.autograd.grad(z, inputs, grad.to(z), allow_unused=True)
        return [z.detach().double(), *(g.double() for g in found if g is not None)]

    expected = run(n_by_n, torch.float64, False)
    for right, our, their in zip(
        expected, run(ours, torch.float32, True), run(n_by_n, torch.float32, True), strict=True
    ):
        if right.norm() > 1e-9 * expected[0].norm():  # a bias of phi adds nothing to a softmax
            our, their = (our - right).norm(), (their - right).norm()
            assert our <= 2 * their + 0.01 * right.norm()
