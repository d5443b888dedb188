"""Mask R-CNN with and without a block: training iterations and inference images per second."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lab.benchmarks.gpu.operation import Row

# Detectron2 and what needs it is imported where it is used: without it the other sections run.

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "COCO-InstanceSegmentation"
# The largest that Detectron2 resizes a picture of COCO to, and the mean number of its objects.
IMAGE_SIZE, QUICK_IMAGE_SIZE, OBJECTS = (800, 1333), (64, 96), 7
BATCH, WARM_UP = 2, 3
SECONDS, QUICK_SECONDS = 3.0, 0.0
_QUICK_OPTIONS = [
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 20, "MODEL.RPN.PRE_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
]


class Setting(NamedTuple):
    """A detector, and how it is run. ``processes`` is over how many GPUs, with NCCL."""

    depth: int
    block: bool
    amp: bool
    compiled: bool = False
    processes: int = 1

    def __str__(self) -> str:
        words = [f"R{self.depth}-FPN", "one block" if self.block else "baseline"]
        words += ["AMP"] * self.amp + ["block compiled"] * self.compiled
        return ", ".join([*words, *([f"{self.processes} GPUs"] * (self.processes > 1))])


SETTINGS = (
    *(Setting(50, block, amp) for amp, block in itertools.product((True, False), (False, True))),
    *(Setting(101, block, True) for block in (False, True)),
    Setting(50, True, True, compiled=True),
    *(Setting(101, block, False) for block in (False, True)),
)
QUICK_SETTINGS = (Setting(50, True, True, compiled=True),)


def measure_settings(
    settings: Sequence[Setting], device: torch.device, quick: bool, deadline: float
) -> Iterator[Row]:
    """What is measured of each setting, or why it is not."""
    import nl_detectron

    nl_detectron.add_nonlocal_config  # noqa: B018 its error says that Detectron2 is missing
    for setting in settings:
        if time.monotonic() > deadline:
            yield {"kind": "left out", "what": str(setting), "why": "no time left"}
            continue
        try:
            yield {
                "kind": "detector",
                "setting": str(setting),
                **_measure_setting(setting, device, quick),
            }
        except (RuntimeError, ImportError, FloatingPointError) as error:
            yield {"kind": "left out", "what": str(setting), "why": str(error).splitlines()[0]}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_ddp(device: torch.device, quick: bool) -> Iterator[Row]:
    """One process of several that torchrun started: R50-FPN with a block, AMP; rank 0 reports."""
    rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    setting = Setting(50, True, True, processes=processes)
    row = {"kind": "detector", "setting": str(setting), **_measure_setting(setting, device, quick)}
    torch.distributed.destroy_process_group()
    if rank == 0:
        yield row


def _measure_setting(setting: Setting, device: torch.device, quick: bool) -> Row:
    from detectron2.modeling import build_model
    from detectron2.solver import build_optimizer
    from detectron2.utils.events import EventStorage

    from nl_detectron.modeling import nonlocal_blocks

    torch.manual_seed(0)
    cfg = _config(setting, device, quick)
    model = build_model(cfg)
    size = QUICK_IMAGE_SIZE if quick else IMAGE_SIZE
    batch = [_picture(*size, seed) for seed in range(BATCH)]
    _calibrate(model, batch)
    optimizer = build_optimizer(cfg, model)
    for block in nonlocal_blocks(model).values() if setting.compiled else ():
        block.compile(backend="aot_eager" if quick else "inductor", fullgraph=True)
    trained: nn.Module = model
    if setting.processes > 1:
        ids = [torch.cuda.current_device()] if device.type == "cuda" else None
        trained = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    is_cuda = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=setting.amp and is_cuda)
    dtype = torch.float16 if is_cuda else torch.bfloat16
    precision = torch.autocast(device.type, dtype, enabled=setting.amp)

    def step() -> None:
        with precision:
            loss = sum(trained(batch).values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def infer() -> None:
        with torch.no_grad(), precision:
            model(batch[:1])

    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = QUICK_SECONDS if quick else SECONDS
    with EventStorage():
        rate = _rate(step, device, seconds, setting.processes)
    memory = torch.cuda.max_memory_allocated() if is_cuda else None
    model.eval()
    images = None if setting.processes > 1 else _rate(infer, device, seconds)
    return {"iterations_per_second": rate, "memory_bytes": memory, "images_per_second": images}


def _config(setting: Setting, device: torch.device, quick: bool) -> Any:
    from detectron2.config import get_cfg

    from nl_detectron import add_nonlocal_config

    cfg = get_cfg()
    add_nonlocal_config(cfg)
    name = f"mask_rcnn_R_{setting.depth}_FPN{'_nl' * setting.block}_1x.yaml"
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.merge_from_list(_QUICK_OPTIONS if quick else [])
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", device.type
    cfg.SOLVER.BASE_LR = 1e-5  # the weights are random, and should stay what they are
    return cfg


def _picture(height: int, width: int, seed: int) -> dict[str, Any]:
    """Noise, with as many objects as a picture of COCO has, of all its sizes, and polygon masks."""
    from detectron2.structures import Boxes, Instances, PolygonMasks

    random = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8)
    shares = 0.03 * 20 ** torch.rand(OBJECTS, 2, generator=random)  # 3 % to 60 % of a side
    sides = shares * torch.tensor([width, height])
    corners = torch.rand(OBJECTS, 2, generator=random) * (torch.tensor([width, height]) - sides)
    angles = torch.linspace(0, 2 * torch.pi, 25)[:-1]
    unit = torch.stack([angles.cos(), angles.sin()], 1) / 2 + 0.5
    polygons = [(corner + unit * side).flatten().numpy() for corner, side in zip(corners, sides)]
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], 1))
    instances.gt_classes = torch.randint(0, 80, (OBJECTS,), generator=random)
    instances.gt_masks = PolygonMasks([[polygon] for polygon in polygons])
    return {"image": image, "instances": instances, "height": height, "width": width}


@torch.no_grad()
def _calibrate(model: Any, batch: list[dict[str, Any]]) -> None:
    """Give frozen batch norms the statistics of what they see: otherwise each layer's features are
    larger than those before."""
    from detectron2.layers import FrozenBatchNorm2d

    def adopt(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        norm.running_mean = inputs[0].mean((0, 2, 3))
        norm.running_var = inputs[0].var((0, 2, 3)) + 1e-3

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(adopt) for norm in norms]
    model.backbone(model.preprocess_image(batch).tensor)
    for hook in hooks:
        hook.remove()


def _rate(
    function: Callable[[], None], device: torch.device, seconds: float, processes: int = 1
) -> float:
    """Calls per second, warm; all processes make the same number of calls."""

    def run(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    run(WARM_UP if seconds else 0)
    count = max(1, int(seconds / run(1)))
    if processes > 1:
        shared = torch.tensor(count, device=device)
        torch.distributed.broadcast(shared, 0)
        count = int(shared)
    return count / run(count)
