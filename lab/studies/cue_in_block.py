#!/usr/bin/env python3
"""How much a block tells about the cue, for each setting of long_range.yaml with one block.

    python lab/studies/cue_in_block.py
    python lab/studies/cue_in_block.py --trained output/studies/long_range

On 128 pictures as one batch: half the distance between the block's mean output z - x for the one
class and for the other, over the root mean square of its input x, in percent; of fresh blocks, or
of those that a study has trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, detection_utils
from detectron2.modeling import build_model
from tabulate import tabulate
from tqdm import tqdm

from lab.study.plan import TrainingRun, load_plan
from lab.study.study_report import mean_and_deviation
from nl_detectron import add_nonlocal_config
from nl_detectron.analysis.recording import record_calls
from nl_detectron.data import register_built_in
from nl_detectron.engine.command_line import Parser
from nl_detectron.modeling import nonlocal_blocks
from nl_detectron.weights.checkpoint_io import load_checkpoint

NUM_PICTURES = 128


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--trained", type=Path, metavar="STUDY", help="the folder of the study")
    args = parser.parse_args()
    plan = load_plan(Path(__file__).with_name("long_range.yaml"))
    shares: dict[str, list[float]] = {}
    for run in tqdm(plan.runs(args.trained or Path("unused")), unit="run"):
        share = cue_share(run, is_trained=args.trained is not None)
        if share is not None:
            shares.setdefault(run.setting, []).append(100 * share)
    rows = [(f"`{name}`", mean_and_deviation(values)) for name, values in shares.items()]
    print(tabulate(rows, ["setting", "cue, % of x"], tablefmt="github", disable_numparse=True))


def cue_share(run: TrainingRun, is_trained: bool = False) -> float | None:
    """None if it is not about the far cue, or the backbone has not exactly one block."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg(run.config))
    cfg.MODEL.DEVICE = "cpu"
    if cfg.DATASETS.TRAIN != ("long_range_train",) or cfg.MODEL.KEYPOINT_ON:
        return None
    torch.manual_seed(run.seed)
    model = build_model(cfg).train()
    if is_trained:
        model.load_state_dict(load_checkpoint(run.folder / "model_final.pth")["model"])
    blocks = nonlocal_blocks(model.backbone)
    if len(blocks) != 1:
        return None
    ((name, block),) = blocks.items()
    register_built_in(cfg.DATASETS.TRAIN)
    pictures = DatasetCatalog.get("long_range_train")[:NUM_PICTURES]
    batch = [{"image": _read(picture["file_name"], cfg.INPUT.FORMAT)} for picture in pictures]
    with torch.no_grad():
        with record_calls(blocks) as calls:
            model.backbone(model.preprocess_image(batch).tensor)
        ((x,),) = calls[name]
        change = block(x) - x
    classes = torch.tensor([picture["annotations"][0]["category_id"] for picture in pictures])
    means = [change[classes == c].mean((0, 2, 3)) for c in (0, 1)]
    input_size = x.square().mean((0, 2, 3)).sum().sqrt()
    return float((means[0] - means[1]).norm() / 2 / input_size)


def _read(file: str, image_format: str) -> torch.Tensor:
    pixels = detection_utils.read_image(file, image_format)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


if __name__ == "__main__":
    main()
