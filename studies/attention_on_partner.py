#!/usr/bin/env python3
"""What the blocks of a study of long_range_match attend to from the squares.

    python tools/study.py studies/long_range_match.yaml
    python studies/attention_on_partner.py output/studies/long_range_match

Of each setting with attention, on pictures of its validation set; in percent, mean and sample
standard deviation over the seeds:

    entropy     of the attention, where it is defined; 100 is even
    bright,     of the |weights| of a square's centre, the share that is on its partner, by class:
    dark        on the keys whose centres lie in the disc, and the nearest to its centre
    adds,       of the contributions to it, the share that is on its partner, for each class
    bright ...
    even        the share if all places are alike
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from tabulate import tabulate
from torch import nn

from nl_detectron.analysis.attention import record_attention
from nl_detectron.analysis.attention_map import AttentionMap
from nl_detectron.analysis.block_report import inspect_blocks
from nl_detectron.data.long_range_match import load_with_partners
from nl_detectron.engine.command_line import Parser, positive_int
from nl_detectron.engine.predictor import Predictor, trained_config
from nl_detectron.study.plan import load_plan
from nl_detectron.study.report import mean_and_deviation
from nl_detectron.study.runner import CONFIG, read_result

SHARES = {"weights": "", "contributions": "adds, "}
COLUMNS = ("entropy", "bright", "dark", "adds, bright", "adds, dark", "even")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, metavar="STUDY", help="the folder of the study")
    parser.add_argument("--num-images", type=positive_int, default=50, metavar="N")
    args = parser.parse_args()
    table: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in load_plan(Path(__file__).with_name("long_range_match.yaml")).runs(args.study):
        if read_result(run) is None:
            continue
        cfg = trained_config(str(run.folder / CONFIG), str(run.folder / "model_final.pth"))
        measured = measure(Predictor(cfg).model, cfg.DATASETS.TEST[0], args.num_images)
        for block, numbers in measured.items():
            of_setting = table.setdefault((f"`{run.setting}`", block), defaultdict(list))
            for column, values in numbers.items():
                of_setting[column].append(100 * float(np.mean(values)))
    rows = [[*key, *(mean_and_deviation(of[c]) for c in COLUMNS)] for key, of in table.items()]
    headers = ["setting", "block", *COLUMNS]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def measure(model: nn.Module, dataset: str, num_images: int) -> dict[str, dict[str, list[float]]]:
    """Block to column to values, as fractions of 1; nothing if the model has no such blocks."""
    classes = MetadataCatalog.get(dataset).thing_classes
    records = load_with_partners(dataset)[:num_images]
    images = [read_image(record["file_name"], "BGR") for record in records]
    batches = [[{"image": torch.tensor(image.transpose(2, 0, 1).copy())}] for image in images]
    measured: dict[str, dict[str, list[float]]] = {}
    for report in inspect_blocks(model, batches):
        measured[report.block] = defaultdict(list)
        if report.attention_entropy is not None:
            measured[report.block]["entropy"] = [report.attention_entropy]
    for record, image in zip(records, images if measured else ()):
        squares = record["annotations"]
        boxes = [square["bbox"] for square in squares]
        centers = [(x + width / 2, y + height / 2) for x, y, width, height in boxes]
        attention = record_attention(model, image)
        for what, prefix in SHARES.items():
            for block in attention.maps(centers, what).blocks:
                for square, map_ in zip(squares, block.maps):
                    assert map_ is not None
                    weights = np.abs(map_.weights)
                    is_partner = keys_of(square["partner"], map_)
                    share = weights[is_partner].sum() / weights.sum()
                    measured[block.name][prefix + classes[square["category_id"]]].append(share)
                    measured[block.name]["even"].append(is_partner.mean())
    return measured


def keys_of(disc: tuple[float, float, float], attention: AttentionMap) -> np.ndarray:
    """(rows, columns) bool: whose centres lie in the disc, and the nearest to its centre."""
    x, y, radius = disc
    left, top, right, bottom = attention.extent
    rows, columns = attention.weights.shape
    to_x = left + (np.arange(columns) + 0.5) * (right - left) / columns - x
    to_y = top + (np.arange(rows)[:, None] + 0.5) * (bottom - top) / rows - y
    distance = np.hypot(to_x, to_y)
    return (distance <= radius) | (distance == distance.min())


if __name__ == "__main__":
    main()
