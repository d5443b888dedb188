from nl_detectron.layers.nonlocal_block import NonLocalBlock
from nl_detectron.layers.pairwise import (
    concatenation_pairwise,
    dot_product_pairwise,
    softmax_pairwise,
)

__all__ = [
    "NonLocalBlock",
    "concatenation_pairwise",
    "dot_product_pairwise",
    "softmax_pairwise",
]
