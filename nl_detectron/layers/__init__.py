"""The blocks, and the non-local operation; they need PyTorch alone."""

from nl_detectron.layers.attention_block import AttentionBlock
from nl_detectron.layers.global_context import GlobalContextBlock
from nl_detectron.layers.local_block import LocalBlock
from nl_detectron.layers.nonlocal_block import NonLocalBlock
from nl_detectron.layers.pairwise import (
    ATTENTION,
    PAIRWISE,
    concatenation_pairwise,
    disentangled_pairwise,
    dot_product_pairwise,
    softmax_average,
    softmax_pairwise,
)
from nl_detectron.layers.subsampling import SUBSAMPLE, spread_over_bins

__all__ = [
    "ATTENTION",
    "PAIRWISE",
    "SUBSAMPLE",
    "AttentionBlock",
    "GlobalContextBlock",
    "LocalBlock",
    "NonLocalBlock",
    "concatenation_pairwise",
    "disentangled_pairwise",
    "dot_product_pairwise",
    "softmax_average",
    "softmax_pairwise",
    "spread_over_bins",
]
