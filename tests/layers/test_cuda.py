"""What only a CUDA device can show. Skipped where there is none."""

import copy

import pytest
import torch
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.layers import PAIRWISE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _convolutions_in_full_float32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def make_block(channels=64, **options):
    torch.manual_seed(0)
    block = NonLocalBlock(channels, norm="", zero_init=False, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=channels**-0.5)
    return block


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("subsample", ["none", "embeddings", "input"])
@pytest.mark.parametrize("channels", [20, 64, 512])
def test_equals_the_cpu(pairwise, subsample, channels):
    on_cpu = make_block(channels, pairwise=pairwise, subsample=subsample).double()
    on_cuda = copy.deepcopy(on_cpu).float().cuda()
    x = torch.randn(2, channels, 17, 12, dtype=torch.float64) + 1
    inputs = [x.clone().requires_grad_(), x.float().cuda().requires_grad_()]
    grad = torch.randn_like(x)
    (expected, e_grads), (actual, a_grads) = (
        (z, torch.autograd.grad(z, [i, *block.parameters()], grad.to(z)))
        for block, i in ((on_cpu, inputs[0]), (on_cuda, inputs[1]))
        for z in [block(i)]
    )
    for a, e in zip([actual, *a_grads], [expected, *e_grads]):
        error = (a.double().cpu() - e).norm() / e.norm()
        assert error < 1e-5


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
