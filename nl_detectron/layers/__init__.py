from nl_detectron.layers.local_block import LocalBlock
from nl_detectron.layers.nonlocal_block import SUBSAMPLE, NonLocalBlock
from nl_detectron.layers.pairwise import (
    PAIRWISE,
    concatenation_pairwise,
    dot_product_pairwise,
    softmax_pairwise,
)

__all__ = [
    "PAIRWISE",
    "SUBSAMPLE",
    "LocalBlock",
    "NonLocalBlock",
    "concatenation_pairwise",
    "dot_product_pairwise",
    "softmax_pairwise",
]
