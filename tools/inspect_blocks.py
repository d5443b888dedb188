#!/usr/bin/env python3
"""Tell what the non-local blocks of a trained model have learnt.

    python tools/inspect_blocks.py output/quick_start/model_final.pth
    python tools/inspect_blocks.py model_final.pth --config-file config.yaml --image street.jpg
    python tools/inspect_blocks.py model_final.pth --num-images 16 --json blocks.json

For each block, on some images:

    ||W_z||       norm of the weights after the attention
    |gamma|       mean scale of the norm after W_z; it starts at 0, where the block is the identity
    effective     norm of W_z with batch norm folded in, as it acts in inference
    change        ||z - x|| / ||x||: by how much the block changes its input
    entropy       of the attention to N_k places over log N_k: 0 is one place, 1 is all alike; only
                  where the weights are a distribution: not for dot_product and concatenation
    dependence    on the query: (1 - cos) / 2 between the attention maps of two queries, mean of
                  many; 0 is the same map for all (Table 1 of GCNet, https://arxiv.org/abs/1904.11492)

and a sentence on what they mean. "-" is what the block has not. On long_range_match* there is also
what squares attend to, and whether that is the disc that tells their class. KEY VALUE pairs
override the config.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tabulate import tabulate

from nl_detectron.analysis.block_report import BlockReport, inspect_records
from nl_detectron.analysis.partner import describe_squares, inspect_squares
from nl_detectron.data.coco_format import Record
from nl_detectron.engine.command_line import Parser, exit_on_user_error, positive_int
from nl_detectron.engine.predictor import Predictor, files_of_run, trained_config
from nl_detectron.engine.setup import register_datasets
from nl_detectron.files import check_target

# An entropy of 0.9999 is not 1.
COLUMNS = {
    "block": ("block", ""),
    "pairwise": ("pairwise", ""),
    "||W_z||": ("out_weight_norm", ".3g"),
    "|gamma|": ("mean_abs_gamma", ".3g"),
    "effective": ("effective_norm", ".3g"),
    "change": ("relative_change", ".3g"),
    "entropy": ("attention_entropy", ".4f"),
    "dependence": ("query_dependence", ".2g"),
}
"""Header to a field of BlockReport, and how it is written."""


@exit_on_user_error()
def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_with_overrides(arguments)
    config_file, weights = args.config_file, args.checkpoint
    if not config_file:
        config_file, weights = files_of_run(args.checkpoint)
    if args.json:
        sources = [weights, config_file, *(args.image or ())]
        check_target("--json", args.json, sources, overwrite=args.overwrite)
    cfg = trained_config(config_file, weights, args.opts)
    records = load_records(cfg, args.image, args.num_images)
    predictor = Predictor(cfg)
    reports = inspect_records(predictor, records)
    if not reports:
        raise ValueError(f"the model of {config_file} has no non-local blocks")
    print(table(reports))
    for block, squares in inspect_squares(predictor, records).items():
        print(f"{block}: {describe_squares(squares)}")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(r) for r in reports], indent=2))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="or the folder of its run")
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="default: config.yaml in the checkpoint's folder")
    add("--image", action="append", metavar="FILE", help="what to look at; may be repeated")
    first = "without --image: the first N of the config's test dataset (default: %(default)s)"
    add("--num-images", type=positive_int, default=4, metavar="N", help=first)
    add("--json", type=Path, metavar="FILE", help="write the measurements here, too")
    parser.add_overwrite()
    parser.add_overrides()
    return parser


def load_records(cfg: CfgNode, files: list[str] | None, count: int) -> list[Record]:
    """Of the images, or the first of the test dataset."""
    if files:
        return [{"file_name": file} for file in files]
    try:
        register_datasets(cfg, eval_only=True)
        return DatasetCatalog.get(cfg.DATASETS.TEST[0])[:count]
    except (OSError, LookupError) as error:
        raise ValueError(
            f"the test dataset of the config, {cfg.DATASETS.TEST}, is not here ({error}): name "
            "images with --image"
        ) from error


def table(reports: list[BlockReport]) -> str:
    rows = [[getattr(report, field) for field, _ in COLUMNS.values()] for report in reports]
    formats = [form for _, form in COLUMNS.values()]
    numbers = tabulate(rows, list(COLUMNS), floatfmt=formats, missingval="-")
    return "\n".join([numbers, "", *(f"{report.block}: {report.sentence()}" for report in reports)])


if __name__ == "__main__":
    main()
