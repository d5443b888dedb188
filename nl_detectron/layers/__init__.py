"""The blocks, and the non-local operation; they need PyTorch alone."""

from nl_detectron.layers.attention_block import AttentionBlock
from nl_detectron.layers.balanced_pyramid import BalancedPyramid
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
from nl_detectron.layers.timm_attention import TIMM_ATTENTION, TimmAttention

__all__ = [
    "ATTENTION",
    "PAIRWISE",
    "SUBSAMPLE",
    "TIMM_ATTENTION",
    "AttentionBlock",
    "BalancedPyramid",
    "GlobalContextBlock",
    "LocalBlock",
    "NonLocalBlock",
    "TimmAttention",
    "concatenation_pairwise",
    "disentangled_pairwise",
    "dot_product_pairwise",
    "softmax_average",
    "softmax_pairwise",
    "spread_over_bins",
]
