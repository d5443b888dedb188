#!/usr/bin/env python3
"""What the blocks of a study of long_range_match attend to from the squares.

    python tools/study.py lab/studies/long_range_match.yaml
    python lab/studies/attention_on_partner.py output/studies/long_range_match

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
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from lab.study.plan import load_plan
from lab.study.runner import CONFIG, read_result
from lab.study.study_report import mean_and_deviation
from nl_detectron.analysis.block_report import inspect_records
from nl_detectron.analysis.partner import inspect_squares
from nl_detectron.engine.command_line import Parser, positive_int
from nl_detectron.engine.predictor import Predictor, trained_config

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
        measured = measure(Predictor(cfg), cfg.DATASETS.TEST[0], args.num_images)
        for block, numbers in measured.items():
            of_setting = table.setdefault((f"`{run.setting}`", block), defaultdict(list))
            for column, values in numbers.items():
                of_setting[column].append(100 * float(np.mean(values)))
    rows = [[*key, *(mean_and_deviation(of[c]) for c in COLUMNS)] for key, of in table.items()]
    headers = ["setting", "block", *COLUMNS]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def measure(
    predictor: Predictor, dataset: str, num_images: int
) -> dict[str, dict[str, list[float]]]:
    """Block to column to values, as fractions of 1; nothing if the model has no such blocks."""
    classes = MetadataCatalog.get(dataset).thing_classes
    records = DatasetCatalog.get(dataset)[:num_images]
    measured: dict[str, dict[str, list[float]]] = {}
    for report in inspect_records(predictor, records):
        measured[report.block] = defaultdict(list)
        if report.attention_entropy is not None:
            measured[report.block]["entropy"] = [report.attention_entropy]
    for what, prefix in SHARES.items() if measured else ():
        for block, squares in inspect_squares(predictor, records, what).items():
            for square in squares:
                column = prefix + classes[square.category_id]
                measured[block][column].append(square.on_partner)
                measured[block]["even"].append(square.even)
    return measured


if __name__ == "__main__":
    main()
