import itertools

import cv2
import numpy as np
import pytest
import torch
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.layers import PAIRWISE, SUBSAMPLE, spread_over_bins
from tests.layers import peers, reference

GRID = {1: (7,), 2: (5, 6), 3: (2, 5, 4)}
NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "")


def make_block(channels=8, *, randomize=True, **options):
    torch.manual_seed(0)
    block = NonLocalBlock(channels, **options)
    if randomize:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.5)
    return block


def make_input(dims=2, batch=2, channels=8, dtype=torch.float32, grid=None):
    torch.manual_seed(1)
    return torch.randn(batch, channels, *(grid or GRID[dims]), dtype=dtype)


def assert_same_with_gradients(actual, expected, inputs):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    gradients = (torch.autograd.grad(z, inputs, grad) for z in (actual, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("pairwise", "dims", "subsample", "scale"),
    itertools.product(PAIRWISE, (1, 2, 3), SUBSAMPLE, (True, False)),
)
def test_equals_the_equations(pairwise, dims, subsample, scale):
    block = make_block(dims=dims, pairwise=pairwise, subsample=subsample, scale=scale, norm="")
    block.double()
    x = make_input(dims, dtype=torch.float64).requires_grad_()
    tensors = dict(block.named_parameters())
    expected = reference.block(x, tensors, pairwise, subsample, scale)
    assert_same_with_gradients(block(x), expected, [x, *tensors.values()])
    # By differences along random directions, as autograd is on both sides above.
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True)

    single = block.float()(x.detach().float())
    torch.testing.assert_close(single.double(), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("subsample", SUBSAMPLE)
def test_attention_is_f_over_c(pairwise, subsample):
    block = make_block(pairwise=pairwise, subsample=subsample, norm="").double()
    x = make_input(dtype=torch.float64)
    every = range(GRID[2][0] * GRID[2][1])
    weights = block.attention(x, every)
    key_grid = {"none": GRID[2], "pyramid": (110,)}.get(subsample, (2, 3))
    assert weights.shape == (2, len(every), *key_grid)
    weights = weights.flatten(2)
    if "gaussian" in pairwise or pairwise == "disentangled":
        total = 2.0 if pairwise == "disentangled" else 1.0
        torch.testing.assert_close(weights.sum(2), torch.full((2, len(every)), total).double())
    # With the weights of every position, z follows.
    g = block.g(reference.pool(x) if subsample == "input" else x)
    g = reference.SUBSAMPLE[subsample](g)
    y = torch.einsum("bij,bcj->bci", weights, g.flatten(2)).reshape(2, -1, *GRID[2])
    torch.testing.assert_close(x + block.out(y), block(x))


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("subsample", SUBSAMPLE)
@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN"])
def test_weights_times_values_are_what_is_added(pairwise, subsample, norm):
    """But for the bias of W_z and the norm's shift, which no key has a part in."""
    block = make_block(pairwise=pairwise, subsample=subsample, norm=norm).double().eval()
    if norm:
        torch.nn.init.uniform_(block.norm.running_var, 0.5, 2)
        torch.nn.init.normal_(block.norm.running_mean)
        torch.nn.init.normal_(block.norm.weight)
    x = make_input(dtype=torch.float64)
    weights, values = block.attention(x, range(30)), block.values(x)
    if subsample == "pyramid":
        weights = spread_over_bins(weights, GRID[2])
    assert weights.shape[2:] == values.shape[2:]
    added = torch.einsum("bij,bcj->bci", weights.flatten(2), values.flatten(2)).view(x.shape)
    same = block._normalize(block.out.bias.view(1, -1, 1, 1))
    torch.testing.assert_close(added + same, block(x) - x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["GN", "LN"])
def test_of_norms_that_depend_on_the_input_values_have_the_scale_alone(norm):
    block, x = make_block(32, norm=norm), make_input(channels=32)
    plain = make_block(32, norm="")
    plain.load_state_dict(block.state_dict(), strict=False)
    scale = block.norm.weight[:, None, None]
    torch.testing.assert_close(block.values(x), scale * plain.values(x))


def test_values_of_half_precision_are_single():
    block = make_block(norm="BN").half().eval()
    assert block.values(make_input().half()).dtype == torch.float32


def test_attention_positions():
    block, x = make_block(), make_input()
    by_index = block.attention(x, torch.tensor([0, 8, 29]))
    by_coordinates = block.attention(x, [[0, 0], [1, 2], [4, 5]])
    assert torch.equal(by_index, by_coordinates)
    assert block.attention(x, []).shape == (2, 0, *GRID[2])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([30], "leave the grid"),
        ([-1], "leave the grid"),
        ([[0, 6]], "leave the grid"),
        ([[0, 0, 0]], "shape"),
        ([0.5], "integers"),
    ],
)
def test_attention_refuses(positions, message):
    with pytest.raises(ValueError, match=message):
        make_block().attention(make_input(), positions)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("norm", [*NORMS, lambda channels: nn.GroupNorm(4, channels)])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_starts_as_the_identity_and_can_learn(pairwise, norm, dims):
    block = make_block(32, randomize=False, dims=dims, norm=norm, pairwise=pairwise)
    x = make_input(dims, channels=32)
    assert torch.equal(block.eval()(x), x)
    assert torch.equal(block.train()(x), x)

    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    target = torch.roll(x, 1, dims=2)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(block(x), target).backward()
        optimizer.step()
    # After two steps the gradient has passed the zeros on to every other parameter.
    nn.functional.mse_loss(block(x), target).backward()
    assert not torch.equal(block(x), x)
    # A softmax does not see what is the same for all keys.
    unseen = {"phi.bias", "unary.bias"} | ({"theta.bias"} if pairwise == "disentangled" else set())
    assert all(p.grad.any() for name, p in block.named_parameters() if name not in unseen)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_batch_norm_at_inference(norm, dims):
    block = make_block(dims=dims, norm=norm).double().eval()
    for statistic in (block.norm.running_mean, block.norm.running_var):
        nn.init.uniform_(statistic, 0.5, 2)
    plain = NonLocalBlock(8, dims=dims, norm="").double()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "norm" not in k})
    x = make_input(dims, dtype=torch.float64).requires_grad_()

    weight, bias = block.norm.weight, block.norm.bias
    mean, var = block.norm.running_mean, block.norm.running_var
    shape = (-1, *[1] * dims)
    z = (plain(x) - x - mean.view(shape)) / (var + block.norm.eps).sqrt().view(shape)
    expected = x + z * weight.view(shape) + bias.view(shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)

    learnt = [p for p in (weight, bias) if isinstance(p, nn.Parameter)]  # not those of FrozenBN
    grad = torch.randn_like(x)
    actual = torch.autograd.grad(block(x), [x, block.out.weight, *learnt], grad)
    wanted = torch.autograd.grad(expected, [x, plain.out.weight, *learnt], grad)
    for a, e in zip(actual, wanted):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def bytes_kept_for_backward(block, x):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = block(x)
    return z, sum(kept.values())


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("norm", ["BN", "GN", ""])
def test_activation_checkpointing_changes_memory_only(pairwise, norm):
    results = []
    for use_act_checkpoint in (False, True):
        block = make_block(
            32, pairwise=pairwise, norm=norm, use_act_checkpoint=use_act_checkpoint
        ).train()
        x = make_input(channels=32).requires_grad_()
        z, num_bytes = bytes_kept_for_backward(block, x)
        gradients = torch.autograd.grad(z.square().sum(), [x, *block.parameters()])
        results.append((num_bytes, z, *gradients, *block.buffers()))
    (much, *expected), (little, *actual) = results
    assert little < much / 2
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_init_of_w_z(norm):
    options = {"norm": norm, "zero_init_layer": "out"}
    block = make_block(32, randomize=False, **options)
    x = make_input(channels=32)
    assert not block.out.weight.any()
    assert torch.equal(block.train()(x) if norm != "SyncBN" else block.eval()(x), x)
    if norm not in ("", "FrozenBN"):
        assert (block.norm.weight == 1).all()
    without = make_block(32, randomize=False, norm=norm, zero_init=False, zero_init_layer="out")
    assert without.out.weight.any()


@pytest.mark.parametrize("norm", NORMS)
def test_without_zero_init_it_is_not_the_identity(norm):
    block = make_block(32, randomize=False, norm=norm, zero_init=False)
    x = make_input(channels=32)
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norms_normalise(dims):
    x = make_input(dims, channels=32, batch=3)
    bn = make_block(32, randomize=False, dims=dims, norm="BN", zero_init=False)
    branch = (bn(x) - x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(branch.mean(1), torch.zeros(32), atol=1e-4, rtol=0)
    layer_norm = make_block(32, randomize=False, dims=dims, norm="LN", zero_init=False)
    torch.testing.assert_close(
        (layer_norm(x) - x).mean(1), x.new_zeros(3, *GRID[dims]), atol=1e-4, rtol=0
    )


def test_norm_by_callable_gets_the_input_as_it_is():
    block = make_block(dims=3, norm=nn.BatchNorm3d)
    assert block(make_input(3)).shape == make_input(3).shape


def test_weights_start_as_in_the_released_code():
    block = make_block(1024, randomize=False, pairwise="concatenation", norm="BN")
    for conv in (block.theta, block.phi, block.g, block.out, block.concat):
        assert float(conv.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        if conv is not block.concat:
            assert not conv.bias.any()
    assert not block.norm.weight.any()


@pytest.mark.parametrize(
    ("pairwise", "children"),
    [
        ("gaussian", ["g", "out", "norm"]),
        ("embedded_gaussian", ["theta", "phi", "g", "out", "norm"]),
        ("dot_product", ["theta", "phi", "g", "out", "norm"]),
        ("concatenation", ["theta", "phi", "g", "concat", "out", "norm"]),
        ("disentangled", ["theta", "phi", "g", "unary", "out", "norm"]),
    ],
)
def test_children(pairwise, children):
    block = make_block(10, pairwise=pairwise, reduction=3)
    assert [name for name, _ in block.named_children()] == children
    assert block.g.out_channels == 3
    assert isinstance(block, CNNBlockBase)
    assert (block.in_channels, block.out_channels, block.stride) == (10, 10, 1)


def test_freeze():
    block = make_block().freeze()
    assert not any(p.requires_grad for p in block.parameters())
    assert isinstance(block.norm, FrozenBatchNorm2d)


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("subsample", SUBSAMPLE)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(pairwise, subsample, training):
    block = make_block(pairwise=pairwise, subsample=subsample).train(training)
    x = make_input(batch=0).requires_grad_()
    z = block(x)
    assert z.shape == x.shape
    z.sum().backward()
    # All parameters take part, or distributed training would wait for their gradients forever.
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())
    assert all(torch.isfinite(buffer).all() for buffer in block.buffers())
    assert block.attention(x, [0]).shape[:2] == (0, 1)


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("subsample", SUBSAMPLE)
@pytest.mark.parametrize("grid", [(1, 6), (6, 1), (1, 1), (2, 3), (7, 5)])
def test_thin_and_odd_grids(pairwise, subsample, grid):
    block = make_block(pairwise=pairwise, subsample=subsample, norm="").double()
    x = make_input(grid=grid, dtype=torch.float64).requires_grad_()
    tensors = dict(block.named_parameters())
    expected = reference.block(x, tensors, pairwise, subsample, True)
    assert_same_with_gradients(block(x), expected, [x, *tensors.values()])
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True)


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_memory_layouts(pairwise, layout):
    block = make_block(pairwise=pairwise, subsample="embeddings")
    x = make_input(grid=(6, 6))
    if layout == "channels_last":
        other = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        other = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        other = x.repeat_interleave(2, dim=3)[..., ::2]
    x.requires_grad_()
    other.requires_grad_()
    z, z_other = block(x), block(other)
    torch.testing.assert_close(z_other, z, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(z)
    (grad,) = torch.autograd.grad(z, x, weight)
    (grad_other,) = torch.autograd.grad(z_other, other, weight)
    torch.testing.assert_close(grad_other, grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("subsample", SUBSAMPLE)
def test_single_precision_has_the_gradients_of_double(pairwise, subsample):
    """
    Of one large image, on which weights are folded. PyTorch's batch norm has wrong gradients for a
    batch of one whose memory does not lie as it expects.
    """
    results = []
    for dtype in (torch.float64, torch.float32):
        block = make_block(32, pairwise=pairwise, subsample=subsample).to(dtype).eval()
        for parameter in block.parameters():
            parameter.data *= 0.3
        x = make_input(batch=1, channels=32, grid=(20, 24)).to(dtype).requires_grad_()
        z = block(x)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        results.append([z, *torch.autograd.grad(z, [x, *block.parameters()], grad)])
    least = 1e-3 * max(e.norm() for e in results[0])
    for expected, actual in zip(*results):
        assert (actual - expected).norm() < 2e-4 * expected.norm().clamp(min=least)


def test_does_not_change_its_input():
    x = make_input()
    before = x.clone()
    make_block()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_finite_where_float32_is(pairwise, dtype, autocast):
    # 512-channel embeddings of magnitude 50: identity embeddings of such an input.
    block = make_block(512, pairwise=pairwise, reduction=1, randomize=False).eval()
    for conv in filter(None, (block.theta, block.phi, block.g)):
        nn.init.dirac_(conv.weight)
    x = 50 * torch.sign(make_input(channels=512))
    if autocast:
        with torch.autocast("cpu", dtype=dtype):
            z = block(x)
    else:
        x = x.to(dtype)
        z = block.to(dtype)(x)
    assert torch.equal(z, x)  # gamma is 0, and would make NaN of an infinite y


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_concatenation_with_large_terms(autocast):
    # w_f^T theta alone would leave float16's range.
    block = make_block(512, pairwise="concatenation", reduction=1, randomize=False, zero_init=False)
    for conv in (block.theta, block.phi):
        nn.init.dirac_(conv.weight)
    nn.init.constant_(block.concat.weight, 200.0)
    x = make_input(channels=512).abs()
    expected = block.eval()(x) - x
    if autocast:
        with torch.autocast("cpu", dtype=torch.float16):
            actual = block(x) - x
    else:
        actual = block.half()(x.half()) - x.half()
    assert actual.isfinite().all()
    torch.testing.assert_close(
        actual.float(), expected, rtol=0.05, atol=0.05 * float(expected.detach().std())
    )


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_on_the_meta_device(pairwise):
    block = make_block(pairwise=pairwise, subsample="embeddings").to("meta")
    assert block(make_input().to("meta")).shape == make_input().shape


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_float32(pairwise, dtype):
    block = make_block(64, pairwise=pairwise, randomize=False, zero_init=False).eval()
    x = make_input(channels=64)
    expected = block(x) - x
    actual = block.to(dtype)(x.to(dtype)) - x.to(dtype)
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
@pytest.mark.parametrize("pool", [False, True])
def test_equals_pytorchvideo(pairwise, pool):
    nonlocal_net = pytest.importorskip("pytorchvideo.layers.nonlocal_net")
    theirs = nonlocal_net.create_nonlocal(
        dim_in=16,
        dim_inner=8,
        pool_size=(1, 2, 2) if pool else None,
        instantiation="dot_product" if pairwise == "dot_product" else "softmax",
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = make_block(
        16, dims=3, pairwise=pairwise, subsample="input" if pool else "none", norm=nn.BatchNorm3d
    )
    ours.load_state_dict({k.removeprefix("conv_"): v for k, v in theirs.state_dict().items()})
    x = make_input(3, channels=16, grid=(3, 6, 8))
    for training in (True, False):
        expected = theirs.train(training)(x)
        torch.testing.assert_close(ours.train(training)(x), expected, rtol=1e-5, atol=1e-5)


def test_equals_multihead_attention():
    channels = 12
    attention = nn.MultiheadAttention(channels, num_heads=1, batch_first=True)
    block = make_block(channels, reduction=1, norm="")
    with torch.no_grad():
        convs = (block.theta, block.phi, block.g)
        attention.in_proj_weight.copy_(torch.cat([conv.weight.flatten(1) for conv in convs]))
        attention.in_proj_bias.copy_(torch.cat([conv.bias for conv in convs]))
        attention.out_proj.weight.copy_(block.out.weight.flatten(1))
        attention.out_proj.bias.copy_(block.out.bias)
    x = make_input(channels=channels)
    tokens = x.flatten(2).transpose(1, 2)
    expected, expected_weights = attention(tokens, tokens, tokens)
    actual = (block(x) - x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    actual_weights = block.attention(x, range(30)).flatten(2)
    torch.testing.assert_close(actual_weights, expected_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("use_scale", "temperature"), [(True, 0.05), (False, 0.7)])
def test_equals_mmsegmentations_disentangled_block(use_scale, temperature):
    dnl_head, _ = peers.mmsegmentation()
    theirs = dnl_head.DisentangledNonLocal2d(
        16, reduction=2, use_scale=use_scale, mode="embedded_gaussian", temperature=temperature
    ).eval()
    options = {"pairwise": "disentangled", "scale": use_scale, "temperature": temperature}
    ours = make_block(16, norm="", **options)
    names = {"theta": "theta", "phi": "phi", "g": "g", "conv_out": "out"}
    for name, own_name in names.items():
        copy_parameters(getattr(ours, own_name), getattr(theirs, name).conv)
    copy_parameters(ours.unary, theirs.conv_mask)
    x = make_input(channels=16, grid=(9, 14))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_equals_mmsegmentations_pyramid_attention():
    """ANN's attention without the norm and the ReLU that its own embeddings have."""
    _, ann_head = peers.mmsegmentation()
    theirs = ann_head.SelfAttentionBlock(
        low_in_channels=16,
        high_in_channels=16,
        channels=8,
        out_channels=16,
        share_key_query=False,
        query_scale=1,
        key_pool_scales=(1, 3, 6, 8),
        conv_cfg=None,
        norm_cfg=None,
        act_cfg=None,
    ).eval()
    ours = make_block(16, norm="", subsample="pyramid")
    copy_parameters(ours.theta, theirs.query_project.conv)
    copy_parameters(ours.phi, theirs.key_project.conv)
    copy_parameters(ours.g, theirs.value_project)
    copy_parameters(ours.out, theirs.out_project)
    x = make_input(channels=16, grid=(9, 14))
    torch.testing.assert_close(ours(x) - x, theirs(x, x), rtol=1e-5, atol=1e-5)


def copy_parameters(ours, theirs):
    """Random ones, for both."""
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("h", [30.0, 60.0])
def test_plain_gaussian_is_non_local_means(channels, h):
    """
    Non-local means weighs pixel j by exp(-|x_i - x_j|^2 / (channels h^2)), for patches of one
    pixel. Where all pixels have the same length, that is exp(2 x_i^T x_j / (channels h^2)) up to a
    factor that cancels: a Gaussian of scaled x. OpenCV's window covers the image for its centre.
    """
    size, centre = 15, 7
    rng = np.random.default_rng(0)
    block = NonLocalBlock(channels, pairwise="gaussian", reduction=1, scale=False, norm="").double()
    for conv in (block.g, block.out):
        nn.init.dirac_(conv.weight)
    to_unit = (2 / (channels * h * h)) ** 0.5
    for share in (0.3, 0.5, 0.8):
        image = np.where(rng.random((size, size, channels)) < share, 100, 160).astype(np.uint8)
        expected = cv2.fastNlMeansDenoising(image, None, h, 1, size).reshape(image.shape)
        x = (torch.from_numpy(image).double() - 130).permute(2, 0, 1).unsqueeze(0) * to_unit
        actual = (block(x) - x)[0, :, centre, centre].detach() / to_unit + 130
        # OpenCV rounds to whole grey levels.
        assert np.abs(actual.numpy() - expected[centre, centre]).max() < 0.51


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairwise": "embeded_gaussian"}, "'embeded_gaussian'.*did you mean 'embedded_gaussian'"),
        ({"subsample": "pool"}, "subsample is 'pool'.*'none', 'embeddings', 'input', 'pyramid'"),
        ({"temperature": 0}, "temperature is 0, but must be a number above 0"),
        ({"temperature": True}, "temperature is True"),
        ({"dims": 4}, "dims is 4.*1, 2, 3"),
        ({"reduction": 9}, "reduction is 9.*in_channels=8"),
        ({"reduction": 0}, "reduction is 0"),
        ({"reduction": 2.0}, "reduction is 2.0, but must be an integer"),
        ({"norm": "BatchNorm"}, "norm is 'BatchNorm'.*'BN'"),
        ({"norm": "GN"}, "32 groups.*8 channels"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(8, **options)


@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 9, 5, 5), (8, 5, 5)])
def test_refuses_input(shape):
    with pytest.raises(ValueError, match=r"2-D NonLocalBlock of 8 channels"):
        make_block()(torch.zeros(shape))
