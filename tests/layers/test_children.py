"""What is done to a child of a block acts as in a textbook form, whose modules are all called."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, prune

from nl_detectron import GlobalContextBlock, NonLocalBlock
from nl_detectron.layers import PAIRWISE, LocalBlock

C, GRID = 8, (4, 5)


def make_block(kind):
    torch.manual_seed(0)
    if kind == "global_context":
        block = GlobalContextBlock(C, reduction=2)
    else:
        block = LocalBlock(C) if kind == "local" else NonLocalBlock(C, pairwise=kind)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block.double()


def textbook(block, x):
    """z, from the block's children and the equations, holding all pairs."""
    if isinstance(block, GlobalContextBlock):
        weights = block.context(x).flatten(2).softmax(2)
        context = (x.flatten(2) @ weights.mT).unsqueeze(3)
        z = block.norm(block.reduce(context).flatten(1)).relu()
        return x + block.out(z[..., None, None])
    if isinstance(block, LocalBlock):
        return x + block.norm(block.conv3(block.conv2(block.conv1(x).relu()).relu()))
    theta, phi = (x if child is None else child(x) for child in (block.theta, block.phi))
    theta, phi, g = (t.flatten(2) for t in (theta, phi, block.g(x)))
    if block.pairwise == "concatenation":
        sizes = -1, -1, theta.shape[2], phi.shape[2]
        pairs = torch.cat([theta.unsqueeze(3).expand(sizes), phi.unsqueeze(2).expand(sizes)], 1)
        f = block.concat(pairs).squeeze(1).relu() / phi.shape[2]
    elif block.pairwise == "dot_product":
        f = theta.mT @ phi / phi.shape[2]
    elif block.pairwise == "disentangled":
        theta = theta - theta.mean(2, keepdim=True)
        f = (block.logit_scale / block.temperature * theta.mT @ phi).softmax(2)
        f = f + block.unary(x).flatten(2).softmax(2)
    else:
        f = (block.logit_scale * theta.mT @ phi).softmax(2)
    return x + block.norm(block.out((g @ f.mT).unflatten(2, GRID)))


class Adapted(nn.Module):
    """A low-rank adapter around a layer (of a norm, a factor), without a ``weight`` of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.factor = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.down = self.up = None
        if isinstance(layer, nn.Conv2d):
            self.down = nn.Conv2d(layer.in_channels, 2, 1, bias=False).double()
            self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False).double()

    def forward(self, x):
        y = self.layer(x) * self.factor
        # That of a 3 x 3 convolution is 1 x 1, too.
        return y if self.down is None else y + self.up(self.down(x))


class Coarse(nn.Module):
    """As quantisation-aware training has it: what is multiplied is not ``weight``."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight = layer, layer.weight

    def forward(self, x):
        coarse = self.weight + ((4 * self.weight).round() / 4 - self.weight).detach()
        parameters = {**dict(self.layer.named_parameters()), "weight": coarse}
        return torch.func.functional_call(self.layer, parameters, (x,))


def replace(wrapper):
    return lambda block, name: setattr(block, name, wrapper(getattr(block, name)))


def hook(block, name):
    getattr(block, name).register_forward_hook(lambda module, arguments, output: 2 * output)


def shard(block, name):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("PyTorch has no fully_shard")
    fsdp.fully_shard(getattr(block, name), mesh=dist.init_device_mesh("cpu", (1,)))


WAYS = {
    "pruned": lambda block, name: prune.l1_unstructured(getattr(block, name), "weight", 0.5),
    "weight norm": lambda block, name: parametrizations.weight_norm(getattr(block, name)),
    "spectral norm": lambda block, name: parametrizations.spectral_norm(getattr(block, name)),
    "adapted": replace(Adapted),
    "coarse": replace(Coarse),
    "hooked": hook,
    "sharded": shard,
}
CHILDREN = [
    (kind, name)
    for kind in (*PAIRWISE, "global_context", "local")
    for name, _ in make_block(kind).named_children()
]


@pytest.fixture(scope="module")
def _processes(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_pair(kind, name, way):
    pair = make_block(kind), make_block(kind)
    for block in pair:
        torch.manual_seed(1)
        WAYS[way](block, name)
        nn.init.normal_(next(block.parameters()))  # what is computed from it is stale until called
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.usefixtures("_processes")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "name"), CHILDREN)
def test_acts_as_in_the_textbook_form(kind, name, way):
    ours, theirs = make_pair(kind, name, way)
    x = torch.randn(2, C, *GRID, dtype=torch.float64)
    for _ in range(2):  # a second step, after the weights have changed
        results = []
        for block, forward in ((ours, ours), (theirs, lambda x: textbook(theirs, x))):
            z = forward(x)
            block.zero_grad()
            z.square().mean().backward()
            results.append([z, *(whole(p.grad) for p in block.parameters() if p.grad is not None)])
            with torch.no_grad():
                for parameter in block.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("_processes")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "name"), [case for case in CHILDREN if case[0] != "local"])
def test_attention_and_values_are_those_of_what_is_called(kind, name, way):
    """Of weights that were loaded, too, before any forward pass has seen them."""
    block, other = make_pair(kind, name, way)
    x = torch.randn(2, C, *GRID, dtype=torch.float64)
    with torch.no_grad():
        weights = block.attention(x, range(20)).flatten(2)
        values = block.values(x)
        modes = [module.training for module in block.modules()]
        assert modes == [True] * len(modes)
        added = block.eval()(x) - x
        if kind == "global_context":  # to first order
            other.eval()(x)
            torch.testing.assert_close(values, other.values(x))
            context = torch.einsum("bcj,bj->bc", x.flatten(2), weights[:, 0])
            change = torch.einsum("bc,bcj->bj", slope(block, context), x.flatten(2))
            torch.testing.assert_close(change, values.flatten(2).sum(1))
            return
    rest = added - torch.einsum("bij,bcj->bci", weights, values.flatten(2)).view(x.shape)
    torch.testing.assert_close(rest, rest[:1, :, :1, :1].expand_as(rest), rtol=1e-9, atol=1e-9)


@torch.enable_grad()
def slope(block, context):
    """Of the sum of what a global context block adds, by its context (B, C)."""
    context.requires_grad_()
    z = block.norm(block.reduce(context[..., None, None]).flatten(1)).relu()
    return torch.autograd.grad(block.out(z[..., None, None]).sum(), context)[0]


@pytest.mark.parametrize("kind", [*PAIRWISE, "global_context", "local"])
def test_each_child_is_called_once(kind):
    block, called = make_block(kind), []
    for name, child in block.named_children():
        child.register_forward_hook(lambda *_, name=name: called.append(name))
    block(torch.randn(1, C, *GRID, dtype=torch.float64))
    assert sorted(called) == sorted(name for name, _ in block.named_children())
