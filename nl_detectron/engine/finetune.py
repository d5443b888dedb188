"""The recipe of ``train_net.py --finetune``, for so many photographs on such a machine."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from nl_detectron.config import OUR_BACKBONES
from nl_detectron.data.coco_json import annotation_facts
from nl_detectron.engine.block_settings import block_of
from nl_detectron.weights.checkpoint_io import load_checkpoint, split_checkpoint

logger = logging.getLogger(__name__)

# COCO's 1x schedule is 12 epochs; a tenth of the photographs is seen about twice as often.
EPOCHS, MANY, FEW = 12, 5000, 1000
LEAST_ITERATIONS = 300  # below it gamma has no time to move: docs/STUDY.md
MOST_ON_A_CPU = 240  # some 20 minutes of one core
GAMMA_LR_FACTOR = "MODEL.NONLOCAL.GAMMA_LR_FACTOR"
SETTINGS = dict[str, Any]


def schedule(photographs: int, processes: int, on_gpu: bool, given: SETTINGS) -> SETTINGS:
    """Batch, rate, and what depends on the number of iterations, by config keys; what is ``given``
    stays, and the rest follows it."""
    batch = max(4, 2 * processes) if on_gpu else max(2, processes)
    batch = given.get("SOLVER.IMS_PER_BATCH", batch)
    epochs = EPOCHS * max(1, MANY / photographs) ** (1 / 3)
    iterations = max(LEAST_ITERATIONS, math.ceil(epochs * photographs / batch))
    iterations = given.get("SOLVER.MAX_ITER", iterations if on_gpu else MOST_ON_A_CPU)
    fifth = math.ceil(iterations / 5)
    values = {
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.BASE_LR": min(0.0025 * batch, 0.02),
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.WARMUP_ITERS": min(1000, iterations // 10),
        "SOLVER.STEPS": (iterations * 4 // 5,),
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
        "SOLVER.CHECKPOINT_PERIOD": fifth,
        "SOLVER.CHECKPOINT_KEEP_LAST": 2,
        "TEST.EVAL_PERIOD": fifth if on_gpu else 0,
    }
    return {key: given.get(key, value) for key, value in values.items()}


def pictures(cfg: CfgNode, photographs: int, on_gpu: bool) -> SETTINGS:
    """Their sizes, crops of few photographs, and anchors that halve or double with the sizes, by
    config keys; on a CPU also fewer regions."""
    size, before = (800, 1333) if on_gpu else (320, 560), cfg.INPUT.MIN_SIZE_TEST or 800
    scale = 2.0 ** round(math.log2(size[0] / before))
    anchors = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    values: SETTINGS = {
        "INPUT.MIN_SIZE_TRAIN": (640, 672, 704, 736, 768, 800) if on_gpu else (192, 224, 256),
        "INPUT.MAX_SIZE_TRAIN": 1333 if on_gpu else 448,
        "INPUT.MIN_SIZE_TEST": size[0],
        "INPUT.MAX_SIZE_TEST": size[1],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[scale * a for a in of_level] for of_level in anchors],
    }
    if photographs < FEW:
        values |= {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "relative_range"}
        values |= {"INPUT.CROP.SIZE": [0.6, 0.6]}
    if not on_gpu:
        values |= {f"MODEL.RPN.POST_NMS_TOPK_{when}": 250 for when in ("TRAIN", "TEST")}
        values |= {"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64}
    return values


def use_recipe(cfg: CfgNode, explicit: Collection[str], saved: SETTINGS | None = None) -> None:
    """Set, in place, what fine-tuning on the datasets of a config takes here, and say so in one
    line; ``explicit`` keys stay as they are, those ``saved`` in the checkpoint of a resumed run as
    they were. ValueError: there are no weights to start from."""
    model, saved = cfg.MODEL, saved or {}
    if not (model.WEIGHTS or saved):
        raise ValueError("--finetune goes on from trained weights, but MODEL.WEIGHTS is empty")
    photographs, on_gpu = num_photographs(cfg), model.DEVICE.startswith("cuda")
    processes = comm.get_world_size()
    kept = {**saved, **{key: _get(cfg, key) for key in explicit}}
    values = schedule(photographs, processes, on_gpu, kept)
    values |= pictures(cfg, photographs, on_gpu)
    places = {model.BACKBONE.NAME, model.ROI_KEYPOINT_HEAD.NAME}
    start = "no blocks"
    if places & {*OUR_BACKBONES, "NonLocalKeypointHead"}:
        start = "blocks as trained"
        if not (saved or _has_blocks(model.WEIGHTS)):
            # Harmless on photographs, and the only harmless start that is trained soon.
            values[GAMMA_LR_FACTOR] = kept.get(GAMMA_LR_FACTOR, 100.0)
            start = f"fresh blocks, gamma and beta at {values[GAMMA_LR_FACTOR]:g} times the rate"
    values = {key: kept.get(key, value) for key, value in values.items()}
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    solver, sizes = cfg.SOLVER, cfg.INPUT.MIN_SIZE_TRAIN
    where = f"{processes} GPU" if on_gpu else "the CPU"
    logger.info(
        f"--finetune, for {photographs:,} photographs on {where}{'s' * (on_gpu and processes > 1)}"
        f": {in_epochs(cfg, photographs)}, rate {solver.BASE_LR:g} (warm-up {solver.WARMUP_ITERS}, "
        f"a tenth from {', '.join(map(str, solver.STEPS))}), gradients clipped; FREEZE_AT "
        f"{model.BACKBONE.FREEZE_AT}; {start}; short sides "
        f"of {min(sizes)} to {max(sizes)}{', crops' * cfg.INPUT.CROP.ENABLED}, flips; evaluated "
        f"{f'every {cfg.TEST.EVAL_PERIOD} and ' * bool(cfg.TEST.EVAL_PERIOD)}at the end, saved "
        f"every {solver.CHECKPOINT_PERIOD}. KEY VALUE overrides any of it"
    )


def tell_schedule(cfg: CfgNode) -> None:
    """Say in one line how often a run sees a user's own photographs."""
    if any(MetadataCatalog.get(name).get("annotation_facts") for name in cfg.DATASETS.TRAIN):
        logger.info(
            f"The config's schedule: {in_epochs(cfg, num_photographs(cfg))}. --finetune fits it to "
            "your photographs and this machine"
        )


def in_epochs(cfg: CfgNode, photographs: int) -> str:
    """Such as "240 iterations of 2 photographs, 1.0 epochs"."""
    iterations, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
    if scale := cfg.SOLVER.REFERENCE_WORLD_SIZE:  # as Detectron2 will scale them
        iterations = round(iterations * scale / comm.get_world_size())
        batch = batch * comm.get_world_size() // scale
    epochs = iterations * batch / photographs
    return f"{iterations:,} iterations of {batch} photographs, {epochs:,.1f} epochs"


def num_photographs(cfg: CfgNode) -> int:
    """How many pictures of the training sets have anything to learn."""
    facts = [annotation_facts(name) for name in cfg.DATASETS.TRAIN]
    return max(1, sum(of.num_images for of in facts))


def _has_blocks(weights: str) -> bool:
    state, _ = split_checkpoint(load_checkpoint(PathManager.get_local_path(weights)))
    return any(block_of(str(name)) for name in state)


def _get(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
