"""What the tests of this folder share."""

from __future__ import annotations

import torch
from torch import nn

from nl_detectron import NonLocalBlock

GRID = {1: (7,), 2: (5, 6), 3: (3, 6, 4)}


def randomize(module: nn.Module) -> nn.Module:
    """Random weights that keep the size of features, and random statistics; for evaluation."""
    torch.manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        with torch.no_grad():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.5)
    return module.eval()


def our_block(conversion, dims: int = 2, prefix: str = "") -> NonLocalBlock:
    """The block that a conversion's settings describe, with its weights."""
    node = conversion.settings["MODEL"]["NONLOCAL"]
    tensors = {
        name[len(prefix) :]: t
        for name, t in conversion.state_dict.items()
        if name.startswith(prefix)
    }
    options = {key.lower(): value for key, value in node.items() if key != "AFTER_BLOCKS_PER_STAGE"}
    block = NonLocalBlock(tensors["g.weight"].shape[1], dims=dims, **options)
    block.load_state_dict(tensors)
    return block.eval()


def random_input(dims: int, channels: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, channels, *GRID[dims])


def check_equal(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected = theirs(x)
        assert (expected - x).abs().max() > 0.1
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
