import pytest
import torch

from nl_detectron.layers.subsampling import max_pool
from tests.layers import reference


@pytest.mark.parametrize(
    "shape", [(2, 3, 7), (1, 3, 5, 7), (2, 4, 6, 8), (2, 3, 7, 1), (0, 4, 6, 6), (2, 3, 4, 7, 9)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_pooling_is_pytorchs_bit_for_bit(shape, dtype):
    """With and without gradients, ties and NaN, at odd sizes, too."""
    x = torch.randint(-3, 3, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.view(-1)[:1] = torch.nan
    expected = reference.pool(x)
    for pooled in (max_pool(x), max_pool(x.clone().requires_grad_())):
        assert (pooled.shape, pooled.dtype) == (expected.shape, dtype)
        assert torch.equal(pooled.nan_to_num(9), expected.nan_to_num(9))
