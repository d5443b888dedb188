import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nl_detectron.layers import (
    concatenation_pairwise,
    disentangled_pairwise,
    dot_product_pairwise,
    softmax,
    softmax_pairwise,
)
from nl_detectron.layers.softmax import SDPA, SoftmaxPlan
from tests.layers import reference

D, C = 5, 3


def fast(kind, theta, phi, g, w_f=None, scale=0.7):
    if kind == "softmax":
        return softmax_pairwise(theta, phi, g, scale)
    if kind == "dot_product":
        return dot_product_pairwise(theta, phi, g)
    if kind == "disentangled":  # any m would do; this one has gradients, too
        return disentangled_pairwise(theta, phi, phi[:, :, 0], g, scale)
    w_theta, w_phi = w_f.chunk(2)
    return concatenation_pairwise(theta @ w_theta, phi @ w_phi, g)


def exact(kind, theta, phi, g, w_f=None, scale=0.7, mean=None):
    """y; ``mean`` is that of all of theta, if theta is a part of it."""
    theta, phi, g, w_f = (None if t is None else t.double() for t in (theta, phi, g, w_f))
    if kind == "disentangled":
        centred = theta - (theta.mean(1, keepdim=True) if mean is None else mean)
        centred_phi = phi - phi.mean(1, keepdim=True)
        unary = phi[:, :, 0].softmax(1).unsqueeze(1)
        return (reference.weights("embedded_gaussian", centred, centred_phi, scale) + unary) @ g
    name = "embedded_gaussian" if kind == "softmax" else kind
    return reference.weights(name, theta, phi, scale, w_f) @ g


def relative_error(actual, expected):
    return float((actual.double() - expected).norm().detach() / expected.norm().detach())


KINDS = ("softmax", "dot_product", "concatenation", "disentangled")


def inputs(batch=2, queries=11, keys=7, d=D, c=C, dtype=torch.float64, mean=0.0):
    torch.manual_seed(0)
    shapes = [(batch, queries, d), (batch, keys, d), (batch, keys, c), (2 * d,)]
    return [(torch.randn(shape) + mean).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "keys"), [(11, 7), (7, 11), (1, 9), (9, 1), (1, 1)])
def test_equals_the_equation(kind, queries, keys):
    arguments = inputs(queries=queries, keys=keys)
    actual, expected = fast(kind, *arguments), exact(kind, *arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    used = arguments if kind == "concatenation" else arguments[:3]
    for a, e in zip(
        torch.autograd.grad(actual, used, grad), torch.autograd.grad(expected, used, grad)
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pairs_kept", [0, 2**25])
def test_the_softmax_is_kept_or_computed_again(pairs_kept, monkeypatch):
    monkeypatch.setattr(softmax, "_MAX_PAIRS_KEPT", pairs_kept)
    monkeypatch.setattr(softmax, "_MAX_QUERIES_PER_TILE", 4)
    arguments = inputs()[:3]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        actual = fast("softmax", *arguments)
    assert any(t.shape == (2, 11, 7) for t in saved) == (pairs_kept > 0)
    expected = exact("softmax", *arguments)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for _ in range(2):  # the backward pass must leave alone what is kept
        for a, e in zip(
            torch.autograd.grad(actual, arguments, grad, retain_graph=True),
            torch.autograd.grad(expected, arguments, grad, retain_graph=True),
        ):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    theta, phi, g, w_f = inputs()
    assert torch.autograd.gradcheck(
        lambda *tensors: fast(kind, *tensors, w_f.detach()), (theta, phi, g)
    )


def second_derivatives(pairwise, kind, arguments):
    """Of y's square."""
    y = pairwise(kind, *arguments)
    gradients = torch.autograd.grad(y.square().sum(), arguments[:3], create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), arguments[:3])


def test_the_dot_product_has_second_derivatives():
    arguments = inputs()
    torch.testing.assert_close(
        second_derivatives(fast, "dot_product", arguments),
        second_derivatives(exact, "dot_product", arguments),
    )


@pytest.mark.parametrize("kind", ["softmax", "concatenation", "disentangled"])
def test_second_derivatives_are_refused(kind):
    """And not silently without a part, as PyTorch's once_differentiable lets it pass."""
    arguments = inputs(1, 3000, 3000)  # so many that the softmax goes by tiles
    with pytest.raises(RuntimeError, match="this non-local block has no second derivative"):
        second_derivatives(fast, kind, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_dot_products_other_order(kind):
    # More channels than positions: the dot product multiplies theta phi^T first.
    arguments = inputs(queries=4, keys=3, d=40, c=40)
    torch.testing.assert_close(fast(kind, *arguments), exact(kind, *arguments))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize(
    ("queries", "keys", "channels"),
    [
        (1500, 6000, 8),
        (64, 70_000, 8),
        (70_000, 64, 8),
        pytest.param(10_000, 10_000, 32, marks=pytest.mark.slow),
    ],
)
def test_float32_is_accurate_over_many_positions(kind, mean, queries, keys, channels):
    # Sums of thousands of terms of one sign lose digits when they are done carelessly. With one
    # channel and w_f = 1, a and b of the concatenation are theta and phi: a rounded product could
    # put a pair on the other side of the ReLU's kink.
    d = 1 if kind == "concatenation" else channels
    arguments = inputs(1, queries, keys, d=d, c=channels, dtype=torch.float32, mean=mean)
    nn.init.ones_(arguments[3])
    actual = fast(kind, *arguments, scale=channels**-0.5)
    grad = torch.ones_like(actual) + torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, arguments[:3], grad)
    expected = exact_in_parts(kind, *arguments, channels**-0.5, grad)
    for a, e in zip((actual, *gradients), expected):
        assert relative_error(a, e) < 5e-6
        if queries == keys:  # elsewhere a single element may be off by 1e-5 of the largest
            assert (a.double() - e).abs().max() < 5e-6 * e.abs().max()


def exact_in_parts(kind, theta, phi, g, w_f, scale, grad):
    """y and the gradients of theta, phi and g, from at most 4e6 pairs at a time."""
    theta, phi, g = (t.detach().double().requires_grad_() for t in (theta, phi, g))
    size, mean = max(1, 4_000_000 // phi.shape[1]), theta.mean(1, keepdim=True)
    y = []
    for theta_part, grad_part in zip(theta.split(size, 1), grad.split(size, 1)):
        y.append(exact(kind, theta_part, phi, g, w_f, scale, mean))
        y[-1].backward(grad_part.double())
    return torch.cat(y, 1).detach(), theta.grad, phi.grad, g.grad


@pytest.mark.parametrize("plan", [None, SoftmaxPlan(SDPA)])
@pytest.mark.parametrize("outlier", [1e4, -1e8])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("of", ["phi", "g"])
@pytest.mark.parametrize("keys", [4, 110, 1050, 4200])
def test_softmax_is_exact_whatever_the_outliers_that_nobody_attends_to(
    keys, of, share, outlier, plan
):
    """As exact as the N x N form in float32, values and gradients."""
    theta, phi, g = (t.detach() for t in inputs(1, 100, keys, 16, 16, torch.float32)[:3])
    unattended = slice(0, max(1, round(share * keys)))
    theta[..., 0] = theta[..., 0].abs() + 1
    phi[:, unattended, 0] = -abs(outlier) if of == "phi" else -400
    if of == "g":
        g[:, unattended] = outlier
    grad = torch.randn(1, 100, 16)

    def results(run, dtype):
        tensors = [t.to(dtype).requires_grad_() for t in (theta, phi, g)]
        y = run(*tensors)
        return [y.detach(), *torch.autograd.grad(y, tensors, grad.to(dtype))]

    def n_by_n(theta, phi, g):
        return (0.5 * theta @ phi.mT).softmax(2) @ g

    expected, theirs = results(n_by_n, torch.float64), results(n_by_n, torch.float32)
    ours = results(lambda *tensors: softmax_pairwise(*tensors, 0.5, plan), torch.float32)
    for actual, their, right in zip(ours, theirs, expected):
        assert relative_error(actual, right) < 2 * relative_error(their, right) + 2e-7


def test_weights_of_very_many_keys_sum_to_1():
    """PyTorch's softmax alone is off by several times as much."""
    theta, phi, g, _ = inputs(1, 64, 70_000, 8, 8, torch.float32, mean=3.0)
    y = softmax_pairwise(theta, phi, g, 8**-0.5)
    (grad_g,) = torch.autograd.grad(y.sum(), g)
    assert relative_error(grad_g.double().sum(1), torch.full((1, 8), 64.0)) < 5e-7


@pytest.mark.parametrize("of", ["a", "b"])
@pytest.mark.parametrize("share", [0.002, 0.5])
@pytest.mark.parametrize("outlier", [-1e8, -1e4, 1e4, 1e8])
def test_concatenation_is_exact_whatever_the_outliers(of, share, outlier):
    """As exact as adding up the pairs in float32: errors are parts of the sum of |terms|."""
    torch.manual_seed(0)
    a, b, g = torch.randn(1, 500), torch.randn(1, 600), torch.randn(1, 600, 4)
    moved = a if of == "a" else b
    moved[torch.rand_like(moved) < share] += outlier
    grad = torch.randn(1, 500, 4)

    def results(run, *inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        y = run(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]

    def all_pairs(a, b, g):
        return (a.unsqueeze(2) + b.unsqueeze(1)).relu() @ g / b.shape[1]

    doubles = [x.double() for x in (a, b, g)]
    expected = results(all_pairs, *doubles)
    active = (doubles[0].unsqueeze(2) + doubles[1].unsqueeze(1) > 0).double()
    weights = (doubles[0].unsqueeze(2) + doubles[1].unsqueeze(1)).relu() / 600
    products = doubles[2].abs() @ grad.abs().mT.double() / 600  # of the |terms| of each pair
    sizes = [
        weights @ doubles[2].abs(),
        (active * products.mT).sum(2),
        (active * products.mT).sum(1),
        weights.mT @ grad.abs().double(),
    ]
    for actual, right, size in zip(results(concatenation_pairwise, a, b, g), expected, sizes):
        assert ((actual - right).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_empty(kind, batch, queries):
    arguments = inputs(batch=batch, queries=queries)
    y = fast(kind, *arguments)
    assert y.shape == (batch, queries, C)
    y.sum().backward()
    for tensor in arguments[:3]:
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(kind, dtype):
    # Logits reach 512 * 50 * 50 = 1.28e6, 20 times float16's largest number.
    torch.manual_seed(0)
    theta, phi, g = (50 * torch.sign(torch.randn(1, 40, 512)).to(dtype) for _ in range(3))
    theta.requires_grad_()
    w_f = torch.full((1024,), 0.1, dtype=dtype)
    y = fast(kind, theta, phi, g, w_f, scale=1.0)
    assert y.isfinite().all()
    assert relative_error(y, exact(kind, theta, phi, g, w_f, scale=1.0)) < 1e-2
    y.float().mean().backward()
    assert theta.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_lower_the_precision(kind):
    arguments = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # The products that make a and b are the caller's.
        w_theta, w_phi = (w.float() for w in arguments[3].chunk(2))
        terms = [(arguments[0] * w_theta).sum(2), (arguments[1] * w_phi).sum(2), arguments[2]]
        y = concatenation_pairwise(*terms) if kind == "concatenation" else fast(kind, *arguments)
    assert relative_error(y, exact(kind, *arguments)) < 1e-6


@pytest.mark.parametrize("channels", [(16, 16), (16, 8), (12, 20)])
def test_a_fused_kernel_takes_what_a_block_gives(channels):
    """Convolutions put the positions of a channel side by side. There is no kernel but this one."""
    attention = pytest.importorskip("torch.nn.attention")
    d, c = channels
    theta, phi, g = (torch.randn(2, n, 30, requires_grad=True).mT for n in (d, d, c))
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        y = softmax_pairwise(theta, phi, g, 0.3, SoftmaxPlan(SDPA))
        y.sum().backward()
    assert relative_error(y, exact("softmax", theta, phi, g, scale=0.3)) < 1e-6


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_holds_no_matrix_of_all_pairs(kind):
    queries, keys = 6000, 6000
    arguments = inputs(batch=1, queries=queries, keys=keys, dtype=torch.float32)
    with LargestTensor() as largest:
        fast(kind, *arguments).sum().backward()
    assert largest.elements <= queries * keys / 4


def test_the_softmax_keeps_its_result_once():
    theta, phi, g, _ = inputs(dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = softmax_pairwise(theta, phi, g, 0.7)
    alike = [tensor for tensor in saved if tensor.shape == y.shape]
    assert [tensor.data_ptr() for tensor in alike] == [y.data_ptr()]
