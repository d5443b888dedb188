"""The config node ``MODEL.NONLOCAL``."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_nonlocal_config(cfg: CfgNode) -> None:
    """
    Add ``MODEL.NONLOCAL`` with its defaults, the paper's block for COCO.

    Args:
        cfg: Detectron2's config, changed in place.
    """
    cfg.MODEL.NONLOCAL = node = CfgNode()

    # The registered backbone that build_nonlocal_backbone builds and puts blocks into.
    node.BACKBONE = "build_resnet_fpn_backbone"
    # For each stage (res2, res3, res4, res5) the residual blocks after which a non-local block
    # comes; negatives count from the end, so -2 is "right before the last residual block".
    node.AFTER_BLOCKS_PER_STAGE = [[], [], [-2], []]

    # The kind of block, in NONLOCAL_BLOCK_REGISTRY: NonLocalBlock, GlobalContextBlock (GCNet; see
    # docs/BLOCKS.md), LocalBlock (a control without attention), or one of your own. Each reads
    # those of the keys below that mean something to it: GlobalContextBlock REDUCTION and ZERO_INIT.
    node.BLOCK = "NonLocalBlock"
    # The pairwise function: gaussian, embedded_gaussian, dot_product, concatenation, or
    # disentangled (DNL; see docs/BLOCKS.md).
    node.PAIRWISE = "embedded_gaussian"
    # Block channels divided by the channels of theta, phi and g, or of GlobalContextBlock's W_1:
    # for that set 16 or 4, as GCNet does, since this default is the non-local block's.
    node.REDUCTION = 2
    # Multiply the logits of the two Gaussians and of disentangled by d ** -0.5 (the released code;
    # the paper's text does not).
    node.SCALE = True
    # Divide the logits of disentangled's pairs by this; 0.05 is DNL's.
    node.TEMPERATURE = 0.05
    # Max-pool the keys by 2: "embeddings" after phi and g (the paper), "input" before them (the
    # released code); or average them over a "pyramid" of 110 bins (ANN); or "none".
    node.SUBSAMPLE = "embeddings"
    # The normalisation after W_z; anything that Detectron2's get_norm knows.
    node.NORM = "BN"
    # Start each block as the identity.
    node.ZERO_INIT = True
    # By zeros in "norm" (gamma, as in the paper) or in "out" (W_z, which learns much sooner:
    # docs/STUDY.md).
    node.ZERO_INIT_LAYER = "norm"
    # Save memory in training: keep only the block's input and compute the rest again in the
    # backward pass.
    node.USE_ACT_CHECKPOINT = False

    # NonLocalKeypointHead has a block after every so many of its convolutions; 0 is none.
    node.KEYPOINT_HEAD_EVERY = 2


def nonlocal_node(cfg: CfgNode) -> CfgNode:
    """
    Args:
        cfg: a config.

    Returns:
        Its ``MODEL.NONLOCAL``.

    Raises:
        ValueError: there is none.
    """
    if "NONLOCAL" not in cfg.MODEL:
        raise ValueError("The config has no MODEL.NONLOCAL: call add_nonlocal_config(cfg) first")
    return cfg.MODEL.NONLOCAL
