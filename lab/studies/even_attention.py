"""A block whose attention is forced even, for even_attention.yaml."""

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase

from nl_detectron.modeling import NONLOCAL_BLOCK_REGISTRY


@NONLOCAL_BLOCK_REGISTRY.register()
def EvenAttention(cfg: CfgNode, in_channels: int) -> CNNBlockBase:
    """The config's block, with its logits times 0: every place gets the mean of g over all."""
    block = NONLOCAL_BLOCK_REGISTRY.get("NonLocalBlock")(cfg, in_channels)
    block.logit_scale = 0.0
    return block
