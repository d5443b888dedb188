"""The N x N form is the paper's equation."""

import itertools

import pytest
import torch

from nl_detectron import NonLocalBlock
from nl_detectron.benchmark.textbook import TextbookBlock, textbook_operation
from tests.layers import reference


@pytest.mark.parametrize("pairwise", reference.PAIRWISE)
def test_operation(pairwise):
    torch.manual_seed(0)
    theta, phi, g = (torch.randn(2, n, 4, dtype=torch.double) for n in (5, 3, 3))
    w_f = torch.randn(8, dtype=torch.double) if pairwise == "concatenation" else None
    scale = 0.5 if pairwise == "embedded_gaussian" else 1.0
    y = textbook_operation(theta, phi, g, pairwise, scale, w_f)
    torch.testing.assert_close(y, reference.weights(pairwise, theta, phi, scale, w_f) @ g)


@pytest.mark.parametrize(
    ("pairwise", "subsample"),
    itertools.product(reference.PAIRWISE, ("none", "embeddings", "input")),
)
def test_block(pairwise, subsample):
    torch.manual_seed(0)
    block = NonLocalBlock(8, pairwise=pairwise, subsample=subsample, norm="").double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 8, 4, 6, dtype=torch.double)
    expected = reference.block(x, block.state_dict(), pairwise, subsample, scale=True)
    torch.testing.assert_close(TextbookBlock(block)(x), expected)
