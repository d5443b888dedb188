"""The config node ``MODEL.NONLOCAL``."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

from nl_detectron.layers.nonlocal_block import PAIRWISE, SUBSAMPLE, ZERO_INIT_LAYERS
from nl_detectron.layers.norm import NORMS
from nl_detectron.validation import check_choice


def add_nonlocal_config(cfg: CfgNode) -> None:
    """
    Add ``MODEL.NONLOCAL`` with its defaults, the paper's block for COCO, and
    ``SOLVER.CHECKPOINT_KEEP_LAST`` to ``cfg``.
    """
    # Keep only so many checkpoints beside model_final.pth, the last ones; 0 keeps all.
    cfg.SOLVER.CHECKPOINT_KEEP_LAST = 0

    cfg.MODEL.NONLOCAL = node = CfgNode()

    # The registered backbone that build_nonlocal_backbone builds and puts blocks into.
    node.BACKBONE = "build_resnet_fpn_backbone"
    # For each stage (res2, res3, res4, res5) the residual blocks after which a non-local block
    # comes; negatives count from the end, so -2 is "right before the last residual block".
    node.AFTER_BLOCKS_PER_STAGE = [[], [], [-2], []]

    # The pairwise function: gaussian, embedded_gaussian, dot_product or concatenation.
    node.PAIRWISE = "embedded_gaussian"
    # Block channels divided by the channels of theta, phi and g.
    node.REDUCTION = 2
    # Multiply the logits of the two Gaussians by d ** -0.5 (the released code; the paper's text
    # does not).
    node.SCALE = True
    # Max-pool the keys by 2: "embeddings" after phi and g (the paper), "input" before them (the
    # released code), or "none".
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


def block_options(cfg: CfgNode) -> dict[str, Any]:
    """
    The keyword arguments of :class:`NonLocalBlock` that ``MODEL.NONLOCAL`` asks for.

    Raises:
        ValueError: an option's value is not legal; the message names the key. Or there is no
            ``MODEL.NONLOCAL``.
    """
    if "NONLOCAL" not in cfg.MODEL:
        raise ValueError("The config has no MODEL.NONLOCAL: call add_nonlocal_config(cfg) first")
    node = cfg.MODEL.NONLOCAL
    check_choice("MODEL.NONLOCAL.PAIRWISE", node.PAIRWISE, PAIRWISE)
    check_choice("MODEL.NONLOCAL.SUBSAMPLE", node.SUBSAMPLE, SUBSAMPLE)
    check_choice("MODEL.NONLOCAL.NORM", node.NORM, NORMS)
    check_choice("MODEL.NONLOCAL.ZERO_INIT_LAYER", node.ZERO_INIT_LAYER, ZERO_INIT_LAYERS)
    if node.REDUCTION < 1:
        raise ValueError(f"MODEL.NONLOCAL.REDUCTION is {node.REDUCTION}, but must be at least 1")
    return {
        "pairwise": node.PAIRWISE,
        "reduction": node.REDUCTION,
        "scale": node.SCALE,
        "subsample": node.SUBSAMPLE,
        "norm": node.NORM,
        "zero_init": node.ZERO_INIT,
        "zero_init_layer": node.ZERO_INIT_LAYER,
        "use_act_checkpoint": node.USE_ACT_CHECKPOINT,
    }
