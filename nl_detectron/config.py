"""The config node ``MODEL.NONLOCAL``, and whole configs from files and overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from nl_detectron.files import missing
from nl_detectron.validation import did_you_mean


def add_nonlocal_config(cfg: CfgNode) -> None:
    """
    Add ``MODEL.NONLOCAL`` with its defaults, the paper's block for COCO,
    ``SOLVER.CHECKPOINT_KEEP_LAST`` and ``TEST.BEST_CHECKPOINT_METRIC``.

    Args:
        cfg: Detectron2's config, changed in place.
    """
    # Keep only so many checkpoints beside model_final.pth, the last ones; 0 keeps all.
    cfg.SOLVER.CHECKPOINT_KEEP_LAST = 0
    # Keep the weights of the best evaluation (each TEST.EVAL_PERIOD) in model_best.pth: by what is
    # highest then, such as "bbox/AP" (with several test datasets "NAME/bbox/AP"); "" keeps none.
    cfg.TEST.BEST_CHECKPOINT_METRIC = ""

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
    # Learning rates over those of the rest of the model: of gamma and beta, the scale and offset of
    # the norm after W_z, and of all else in the block. From scratch, gamma = 0 with
    # GAMMA_LR_FACTOR 100.0 learns as fast as gamma = 1; in a short fine-tuning it did not
    # (docs/STUDY.md).
    node.GAMMA_LR_FACTOR = 1.0
    node.LR_FACTOR = 1.0
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


@contextmanager
def keys_for_arguments(node: CfgNode) -> Iterator[None]:
    """
    Where a call that is made from the config fails because of an argument, name its key.

    Args:
        node: ``MODEL.NONLOCAL``; the key of an argument has its name.

    Raises:
        ValueError: in the place of one whose message begins with the name of an argument.
    """
    try:
        yield
    except ValueError as error:
        argument, _, rest = str(error).partition(" ")
        if argument.upper() not in node:
            raise
        raise ValueError(f"MODEL.NONLOCAL.{argument.upper()} {rest}") from error


def build_config(config_file: str | Path, overrides: Sequence[Any] = ()) -> CfgNode:
    """
    Detectron2's defaults, ``MODEL.NONLOCAL``, a config file, then overrides.

    Args:
        config_file: plain YAML; a tag that would run Python is an error.
        overrides: config keys and their values in turn, such as ``["SOLVER.BASE_LR", "0.01"]``;
            values may be strings, as on a command line, or what they stand for.

    Returns:
        The config, not frozen.

    Raises:
        FileNotFoundError: there is no such config file.
        KeyError: an unknown config key; the message names the nearest one.
        ValueError: an override has no value or one of another type, or the file cannot be read as
            a config; the message names it.
    """
    if problem := missing(config_file):
        raise FileNotFoundError(f"the config {config_file} {problem}")
    if len(overrides) % 2:
        words = " ".join(map(str, overrides))
        raise ValueError(f"overrides come in pairs of KEY VALUE, but got {words}")
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    try:
        cfg.merge_from_file(str(config_file), allow_unsafe=False)
    # The parsers know only sound files: on others they fail with any error at all.
    except Exception as error:
        if message := _unknown_key(cfg, error):
            raise KeyError(f"{config_file}: {message}") from None
        if message := _wrong_type(error):
            raise ValueError(f"{config_file}: {message}") from error
        reason = " ".join(str(error).split())
        hint = " (a config is plain YAML here and runs no Python)" if "python/" in reason else ""
        raise ValueError(
            f"{config_file} cannot be read as a config: {type(error).__name__}: {reason}{hint}"
        ) from error
    try:
        cfg.merge_from_list(list(overrides))
    # An assertion is how yacs refuses a key.
    except (AssertionError, ValueError) as error:
        if message := _unknown_key(cfg, error):
            raise KeyError(message) from None
        raise ValueError(_wrong_type(error) or str(error)) from error
    return cfg


def _unknown_key(cfg: CfgNode, error: Exception) -> str | None:
    """The message for an error of yacs that is about an unknown key; None for other errors."""
    unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", str(error))
    if unknown is None:
        return None
    return f"Unknown config key {unknown[1]}{did_you_mean(unknown[1], _keys(cfg))}"


def _wrong_type(error: Exception) -> str | None:
    """The message for an error of yacs that is about the type of a value; None for other errors."""
    pattern = (
        r"Type mismatch \(<class '(\w+)'> vs. <class '(\w+)'>\) with values "
        r"\((.*) vs. (.*)\) for config key: (.*)"
    )
    match = re.fullmatch(pattern, str(error), re.DOTALL)
    if match is None:
        return None
    legal, wrong, example, value, key = match.groups()
    return f"{key} is {value!r}, of type {wrong}, but must be of type {legal}, such as {example}"


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys.extend(_keys(value, f"{prefix}{key}."))
    return keys
