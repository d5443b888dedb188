import pytest
import torch
from detectron2.layers import CNNBlockBase
from torch import nn

from nl_detectron import GlobalContextBlock
from nl_detectron.layers import average, numerics, softmax_average
from tests.layers import reference
from tests.layers.test_nonlocal_block import GRID, bytes_kept_for_backward, make_input


def make_block(channels=8, *, randomize=True, **options):
    torch.manual_seed(0)
    block = GlobalContextBlock(channels, **{"reduction": 2, **options})
    if randomize:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.5)
    return block


def check_against_the_equations(block, x):
    x.requires_grad_()
    tensors = dict(block.named_parameters())
    actual, expected = block(x), reference.global_context(x, tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *tensors.values()]
    grad = torch.randn_like(x)
    for a, e in zip(
        torch.autograd.grad(actual, wanted, grad), torch.autograd.grad(expected, wanted, grad)
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(block, (x,))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("chunk", [numerics.MAX_SUMMED, 4])
def test_equals_the_equations(dims, chunk, monkeypatch):
    monkeypatch.setattr(average, "MAX_SUMMED", chunk)
    check_against_the_equations(
        make_block(dims=dims).double(), make_input(dims, dtype=torch.float64)
    )


@pytest.mark.parametrize("grid", [(1, 6), (6, 1), (1, 1), (7, 5)])
def test_thin_and_odd_grids(grid):
    check_against_the_equations(make_block().double(), make_input(grid=grid, dtype=torch.float64))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_values_are_what_a_little_more_weight_adds(dims):
    block, x = make_block(dims=dims).double(), make_input(dims, dtype=torch.float64)
    weights = block.attention(x, [0])[:, 0].flatten(1)
    positions, values = x.flatten(2), block.values(x).flatten(2)
    for j in (0, positions.shape[2] - 1):
        more = 1e-6 * nn.functional.one_hot(torch.tensor(j), positions.shape[2])
        z = [
            block._transform(torch.einsum("bcj,bj->bc", positions, weights + sign * more))
            for sign in (1, -1)
        ]
        torch.testing.assert_close((z[0] - z[1]) / 2e-6, values[:, :, j], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ratio", [1 / 4, 1 / 16])
def test_equals_mmcv(ratio):
    context_block = pytest.importorskip("mmcv.cnn.bricks.context_block")
    theirs = context_block.ContextBlock(64, ratio)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = GlobalContextBlock(64, reduction=round(1 / ratio))
    names = {"context": "conv_mask", "reduce": "0", "norm": "1", "out": "3"}
    for child, name in names.items():
        other = theirs.conv_mask if child == "context" else theirs.channel_add_conv[int(name)]
        for parameter, value in zip(getattr(ours, child).parameters(), other.parameters()):
            parameter.data = value.data.view(parameter.shape)
    x = make_input(channels=64, grid=(9, 14))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_starts_as_the_identity_and_can_learn(dims):
    block = make_block(randomize=False, dims=dims)
    x = make_input(dims)
    assert torch.equal(block(x), x)
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    target = x + x.flatten(2).amax(2).view(*x.shape[:2], *[1] * dims)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(block(x), target).backward()
        optimizer.step()
    nn.functional.mse_loss(block(x), target).backward()
    assert not torch.equal(block(x), x)
    # The softmax does not see a constant.
    assert all(p.grad.any() for name, p in block.named_parameters() if name != "context.bias")
    with_context = make_block(randomize=False, dims=dims, zero_init=False)(x)
    assert (with_context - x).std() > 0.3


def test_attention_is_one_map_for_all():
    block, x = make_block().double(), make_input(dtype=torch.float64)
    weights = block.attention(x, [[0, 0], [4, 5], [2, 3]])
    assert weights.shape == (2, 3, *GRID[2])
    assert torch.equal(weights[:, 0], weights[:, 1])
    assert torch.equal(weights[:, 0], weights[:, 2])
    expected = block.context(x).flatten(1).softmax(1).view(2, *GRID[2])
    torch.testing.assert_close(weights[:, 0], expected)
    assert block.attention(x, []).shape == (2, 0, *GRID[2])
    with pytest.raises(ValueError, match="leave the grid"):
        block.attention(x, [30])


def test_children():
    block = make_block(64, randomize=False, reduction=16)
    shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    assert shapes == {
        "context.weight": (1, 64, 1, 1),
        "context.bias": (1,),
        "reduce.weight": (4, 64, 1, 1),
        "reduce.bias": (4,),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "out.weight": (64, 4, 1, 1),
        "out.bias": (64,),
    }
    assert isinstance(block, CNNBlockBase)
    assert (block.in_channels, block.out_channels, block.stride) == (64, 64, 1)
    assert not any(p.requires_grad for p in block.freeze().parameters())


def test_empty_batch():
    block, x = make_block(), make_input(batch=0).requires_grad_()
    z = block(x)
    assert z.shape == x.shape
    z.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())
    assert block.attention(x, [0]).shape == (0, 1, *GRID[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype, autocast):
    # Sums of 512 values of magnitude 50 times W_1 would leave float16's range.
    block = make_block(512, randomize=False, zero_init=False)
    nn.init.constant_(block.reduce.weight[:1].data, 10.0)
    x = 50 * torch.sign(make_input(channels=512)).abs()
    expected = block(x) - x
    if autocast:
        with torch.autocast("cpu", dtype=dtype):
            z = block(x)
    else:
        z = block.to(dtype)(x.to(dtype))
        assert z.dtype == dtype
    assert z.isfinite().all()
    torch.testing.assert_close(z.float() - x, expected, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_float32_is_accurate_over_many_positions(mean):
    torch.manual_seed(0)
    logits, g = torch.randn(1, 70_000), torch.randn(1, 70_000, 8) + mean
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (logits, g)]
        y = softmax_average(*inputs)
        results.append([y, *torch.autograd.grad(y.sum(), inputs)])
    for actual, expected in zip(*results):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 5e-6


def test_keeps_no_copy_of_half_precision_features():
    block = make_block(64, reduction=16).half()
    x = make_input(channels=64, grid=(40, 40)).half().requires_grad_()
    _, num_bytes = bytes_kept_for_backward(block, x)
    assert num_bytes < 1.2 * x.numel() * x.element_size()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "reduction is 0, but must be an integer from 1 to in_channels // 2 = 4"),
        ({"reduction": 5}, "reduction is 5"),
        ({"reduction": 2.0}, "reduction is 2.0"),
        ({"dims": 4}, "dims is 4.*1, 2, 3"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        GlobalContextBlock(8, **options)


def test_refuses_input():
    with pytest.raises(ValueError, match="2-D GlobalContextBlock of 8 channels"):
        make_block()(torch.zeros(2, 9, 5, 5))
