"""The config node ``MODEL.NONLOCAL``, and whole configs from files and overrides."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from nl_detectron.files import missing
from nl_detectron.validation import ArgumentError, did_you_mean

logger = logging.getLogger(__name__)

_MOST_YAML_VALUES = 100_000
OUR_BACKBONES = ("build_nonlocal_backbone", "build_balanced_fpn_backbone")


def add_nonlocal_config(cfg: CfgNode) -> None:
    """
    Add ``MODEL.NONLOCAL`` with its defaults, the paper's block for COCO, ``DATASETS.OWN``,
    ``SOLVER.CHECKPOINT_KEEP_LAST``, ``TEST.BEST_CHECKPOINT_METRIC`` and ``TEST.FAST_EVAL``. What is
    there is kept.

    Args:
        cfg: Detectron2's config, changed in place.

    Raises:
        AttributeError: something is missing, and the config is frozen.
    """
    # Keep only so many checkpoints beside model_final.pth, the last ones; 0 keeps all.
    _add_missing(cfg.SOLVER, {"CHECKPOINT_KEEP_LAST": 0})
    # Keep the weights of the best evaluation (each TEST.EVAL_PERIOD) in model_best.pth: by what is
    # highest then, such as "bbox/AP" (with several test datasets "NAME/bbox/AP"); "" keeps none.
    _add_missing(cfg.TEST, {"BEST_CHECKPOINT_METRIC": ""})
    # Compute the APs by faster-coco-eval, if it is installed: the same, 7 to 20 times as fast.
    _add_missing(cfg.TEST, {"FAST_EVAL": False})
    # Data of one's own in COCO's format, which DATASETS.TRAIN and TEST name "train" and "val": the
    # files and folders, and COCO's list of categories. The options of train_net.py set them, and
    # config.yaml keeps them.
    _add_missing(cfg.DATASETS, {"OWN": CfgNode()})
    own = {"TRAIN_JSON": "", "TRAIN_IMAGES": "", "VAL_JSON": "", "VAL_IMAGES": ""}
    _add_missing(cfg.DATASETS.OWN, {**own, "CATEGORIES": []})

    node = CfgNode()

    # The registered backbone that build_nonlocal_backbone builds and puts blocks into.
    node.BACKBONE = "build_resnet_fpn_backbone"
    # For each stage (res2, res3, res4, res5) the residual blocks after which a non-local block
    # comes; negatives count from the end, so -2 is "right before the last residual block".
    node.AFTER_BLOCKS_PER_STAGE = [[], [], [-2], []]
    # Names, or patterns as in fnmatch, of modules in the backbone after which a block comes, too,
    # such as "fpn_output*" or "bottom_up.res4.*.conv3"; "bottom_up.res4.4.sum" is a bottleneck's
    # sum, before its last ReLU.
    node.AFTER_MODULES = []

    # The kind of block, in NONLOCAL_BLOCK_REGISTRY: NonLocalBlock, GlobalContextBlock (GCNet; see
    # docs/BLOCKS.md), LocalBlock (a control without attention), TimmAttention, or one of your own.
    # Each reads those of the keys below that mean something to it: GlobalContextBlock REDUCTION and
    # ZERO_INIT.
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
    # TimmAttention's layer, by its name in timm.layers.create_attn: se, eca, cbam, ge, gc, ...
    node.TIMM = "se"
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

    _add_missing(cfg.MODEL, {"NONLOCAL": CfgNode()})
    _add_missing(cfg.MODEL.NONLOCAL, node)


def use_nonlocal_backbone(cfg: CfgNode) -> None:
    """
    Let ``build_nonlocal_backbone`` build the backbone of a config around the one that it has, as
    ``MODEL.NONLOCAL`` says. Call it when all is merged; a second call changes nothing.

    Args:
        cfg: Detectron2's config, changed in place. What is missing of ``MODEL.NONLOCAL`` is added.

    Raises:
        ValueError: the config is frozen, and would have to be changed.
    """
    is_ours = cfg.MODEL.BACKBONE.NAME in OUR_BACKBONES
    if cfg.is_frozen() and not (is_ours and "NONLOCAL" in cfg.MODEL):
        raise ValueError(
            "The config is frozen: call use_nonlocal_backbone(cfg) before cfg.freeze(), and before "
            "default_setup(cfg, args), which writes it to config.yaml"
        )
    add_nonlocal_config(cfg)
    if not is_ours:
        cfg.MODEL.NONLOCAL.BACKBONE = cfg.MODEL.BACKBONE.NAME
        cfg.MODEL.BACKBONE.NAME = OUR_BACKBONES[0]


def nonlocal_node(cfg: CfgNode) -> CfgNode:
    """``cfg.MODEL.NONLOCAL``; a ValueError says that there is none."""
    if "NONLOCAL" not in cfg.MODEL:
        raise ValueError("The config has no MODEL.NONLOCAL: call add_nonlocal_config(cfg) first")
    return cfg.MODEL.NONLOCAL


@contextmanager
def keys_for_arguments(node: CfgNode) -> Iterator[None]:
    """Where a call that is made from ``MODEL.NONLOCAL`` refuses an argument, name its key."""
    try:
        yield
    except ArgumentError as error:
        if (key := error.argument.upper()) not in node:
            raise
        raise ArgumentError(f"MODEL.NONLOCAL.{key}", error.problem) from error


def build_config(config_file: str | Path, overrides: Sequence[Any] = ()) -> CfgNode:
    """
    Detectron2's defaults, ``MODEL.NONLOCAL``, a config file, then overrides. A whole number is
    taken wherever a float is asked. With a project (:func:`~nl_detectron.project.use_project`) the
    file may have keys that nobody declared; a warning names them.

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
    defaults = get_cfg()
    add_nonlocal_config(defaults)
    cfg = _LenientConfig(defaults)
    cfg.set_new_allowed(defaults.is_new_allowed())
    declared = {key for key, _ in walk(cfg)}
    try:
        cfg.merge_from_file(str(config_file), allow_unsafe=False)
    # The parsers know only sound files: on others they fail with any error at all.
    except Exception as error:
        if message := _unknown_key(cfg, error):
            raise KeyError(
                f"{config_file}: {message} (--project names the code that adds other keys)"
            ) from None
        if message := _wrong_type(error):
            raise ValueError(f"{config_file}: {message}") from error
        reason = " ".join(str(error).split())
        hint = " (a config is plain YAML here and runs no Python)" if "python/" in reason else ""
        raise ValueError(
            f"{config_file} cannot be read as a config: {type(error).__name__}: {reason}{hint}"
        ) from error
    if unknown := [key for key, _ in walk(cfg) if key not in declared]:
        logger.warning(f"{config_file} has keys that nobody declared: {', '.join(unknown)}")
    try:
        cfg.merge_from_list(list(overrides))
    # An assertion is how yacs refuses a key.
    except (AssertionError, ValueError) as error:
        if message := _unknown_key(cfg, error):
            raise KeyError(message) from None
        raise ValueError(_wrong_type(error) or str(error)) from error
    return CfgNode(cfg)


def walk(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a config by their full names, with their values; a node before what is in it."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, CfgNode):
            yield from walk(value, f"{prefix}{key}.")


class _LenientConfig(CfgNode):
    """A config that takes a whole number where a float is asked, which yacs does not, and opens no
    file whose aliases stand for more than a config can hold."""

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        with super()._open_cfg(filename) as file:
            text = file.read()
        _check_yaml_size(text)
        return io.StringIO(text)

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        super().merge_from_other_cfg(_with_floats(cfg_other, self))

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        present = dict(walk(self))
        values = [
            _as_float(self._decode_cfg_value(value), present.get(key))
            for key, value in zip(cfg_list[::2], cfg_list[1::2])
        ]
        super().merge_from_list([x for pair in zip(cfg_list[::2], values) for x in pair])


def _with_floats(node: CfgNode, present: Any) -> CfgNode:
    """A node to be merged, with floats where ``present``, into which it is merged, has them."""
    for key, value in node.items():
        old = present.get(key) if isinstance(present, CfgNode) else None
        is_node = isinstance(value, CfgNode)
        node[key] = _with_floats(value, old) if is_node else _as_float(value, old)
    return node


def _as_float(value: Any, present: Any) -> Any:
    return float(value) if type(value) is int and type(present) is float else value


def _add_missing(node: CfgNode, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key not in node:
            setattr(node, key, value)


def _unknown_key(cfg: CfgNode, error: Exception) -> str | None:
    """The message for an error of yacs that is about an unknown key; None for other errors."""
    if not (unknown := re.search(r"Non-existent (?:config )?key: ([\w.]+)", str(error))):
        return None
    return f"Unknown config key {unknown[1]}{did_you_mean(unknown[1], [k for k, _ in walk(cfg)])}"


def _wrong_type(error: Exception) -> str | None:
    """The message for an error of yacs that is about the type of a value; None for other errors."""
    pattern = (
        r"Type mismatch \(<class '(\w+)'> vs. <class '(\w+)'>\) with values "
        r"\((.*) vs. (.*)\) for config key: (.*)"
    )
    if not (match := re.fullmatch(pattern, str(error), re.DOTALL)):
        return None
    legal, wrong, example, value, key = match.groups()
    return f"{key} is {value!r}, of type {wrong}, but must be of type {legal}, such as {example}"


def _check_yaml_size(text: str) -> None:
    """Refuse aliases of aliases, of which 300 bytes would take all memory once written out."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_YAML_VALUES  # until it is known: an alias may be of itself
            values = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                values = [part for pair in values for part in pair]
            sizes[id(node)] = 1 + sum(map(size, values))
        return sizes[id(node)]

    if size(yaml.compose(text, yaml.SafeLoader)) > _MOST_YAML_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_YAML_VALUES:,} values")
