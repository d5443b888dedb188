"""What only a CUDA device can show. Skipped where there is none."""

import copy
import itertools

import pytest
import torch
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.layers import PAIRWISE, SUBSAMPLE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _convolutions_in_full_float32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def _waiting_is_an_error_where_a_test_asks_for_it():
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_block(channels=64, **options):
    torch.manual_seed(0)
    block = NonLocalBlock(channels, norm="", zero_init=False, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=channels**-0.5)
    return block


# One, odd numbers, res5, res4 and, pooled, res3 and res2 of an 800 x 1344 image.
SIZES = [(1, 1), (17, 11), (25, 42), (50, 84)]
POOLED_SIZES = [(100, 168), (200, 336)]
CASES = [
    *itertools.product(PAIRWISE, ["none", "embeddings", "input"], [20, 64, 512], [(17, 12)]),
    *itertools.product(PAIRWISE, ["none", "embeddings", "input", "pyramid"], [16], SIZES),
    *itertools.product(PAIRWISE, ["embeddings"], [16], POOLED_SIZES),
]


@pytest.mark.parametrize(("pairwise", "subsample", "channels", "size"), CASES)
def test_equals_the_cpu(pairwise, subsample, channels, size):
    on_cpu = make_block(channels, pairwise=pairwise, subsample=subsample).double()
    on_cuda = copy.deepcopy(on_cpu).float().cuda()
    x = torch.randn(2 if channels > 16 else 1, channels, *size, dtype=torch.float64) + 1
    grad = torch.randn_like(x)
    # Rounding puts some pairs on the other side of the ReLU's kink; 1 / temperature is 20.
    tolerance = {"concatenation": 3e-4, "disentangled": 1e-4}.get(pairwise, 1e-5)
    actual = passes(on_cuda, x.float().cuda(), grad)
    assert error(actual, passes(on_cpu, x, grad)) < tolerance


def passes(block, x, grad):
    """z, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    z = block(x)
    return [z.detach(), *torch.autograd.grad(z, [x, *block.parameters()], grad.to(z))]


def error(actual, expected):
    """
    The largest relative error. Some gradients are zero, such as that of phi's bias, which a softmax
    does not see: their error is relative to a hundredth of the largest of the others.
    """
    pairs = [(a.double().cpu(), e.double().cpu()) for a, e in zip(actual, expected)]
    least = 1e-2 * max(e.norm() for _, e in pairs)
    return max((a - e).norm() / e.norm().clamp(min=least) for a, e in pairs)


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_no_pictures(pairwise):
    block = make_block(16, pairwise=pairwise).cuda()
    x = torch.randn(0, 16, 5, 4, device="cuda", requires_grad=True)
    z = block(x)
    z.sum().backward()
    assert z.shape == x.shape == x.grad.shape


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("subsample", ["none", "embeddings"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_against_float64(pairwise, subsample, dtype):
    """Within what rounding the embeddings and weights alone takes away."""
    on_cpu = make_block(64, pairwise=pairwise, subsample=subsample).double()
    on_cuda = copy.deepcopy(on_cpu).float().cuda()
    x = torch.randn(2, 64, 25, 42, dtype=torch.float64)
    grad = torch.randn_like(x)
    expected = passes(on_cpu, x, grad)
    with torch.autocast("cuda", dtype):
        actual = passes(on_cuda, x.float().cuda(), grad)
    assert error(actual, expected) < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("subsample", SUBSAMPLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_captured_by_a_cuda_graph_and_never_waits(pairwise, subsample, dtype):
    block = make_block(64, pairwise=pairwise, subsample=subsample).cuda()
    x = torch.randn(2, 64, 50, 42, device="cuda")
    grad = torch.randn_like(x)

    def run():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            return passes(block, x, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries allocate their workspaces at the first call
        torch.cuda.set_sync_debug_mode("error")
        run()
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert error(captured, run()) < (1e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_compiles_without_graph_breaks(pairwise):
    """The default with its kernels, which take long to be made, the others without."""
    backend = "inductor" if pairwise == "embedded_gaussian" else "aot_eager"
    torch.compiler.reset()
    block = make_block(64, pairwise=pairwise).cuda()
    x = torch.randn(2, 64, 20, 30, device="cuda")
    grad = torch.randn_like(x)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x_ = x.clone().requires_grad_()
    z = compiled(x_)
    gradients = torch.autograd.grad(z, [x_, *block.parameters()], grad)
    assert error([z.detach(), *gradients], passes(block, x, grad)) < 1e-3


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_large_embeddings(pairwise, dtype):
    block = make_block(1024, pairwise=pairwise).cuda()
    x = torch.randn(1, 1024, 14, 14, device="cuda", requires_grad=True)
    # Embeddings of magnitude 50 on 512 channels: their products do not fit float16.
    if pairwise != "gaussian":
        nn.init.normal_(block.theta.weight, std=50 / 32)
        nn.init.normal_(block.phi.weight, std=50 / 32)
    with torch.autocast("cuda", dtype):
        z = block(x)
    z.float().square().mean().backward()
    assert z.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_is_linear_in_the_positions(pairwise, dtype):
    """res3 of an 800 x 1344 image: one float16 for every pair would be 564 MB."""
    block = make_block(512, pairwise=pairwise).cuda()
    x = torch.randn(1, 512, 100, 168, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        block(x).float().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 450e6
