"""Compare the saved predictions of two runs: where is B better than A, and is it for sure?

    $ tools/compare_runs.py output/baseline output/nl
    $ tools/compare_runs.py output/baseline output/nl --task segm --output output/comparison

RUN_A and RUN_B are two OUTPUT_DIRs of train_net.py, evaluated on the same dataset: config.yaml and
inference/coco_instances_results.json are read. Printed are the APs by size and by class as COCO
defines them; their difference with a 95 % interval, from a paired bootstrap over the pictures, and
how many pictures it is about; and by how many points AP50 would rise without the errors of each
kind, which tidecv finds. With --output, index.html there also shows the pictures whose own AP rises
and falls most from A to B, with the truth, A and B side by side. It is one file and loads nothing.

For runs on your own data say where they are, under the name that train_net.py gives them:

    $ python -m nl_detectron.run --data val val.json val/ tools/compare_runs.py RUN_A RUN_B
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from tabulate import tabulate

from lab.comparison import (
    FIELDS,
    KINDS,
    AveragePrecisions,
    Difference,
    Errors,
    compare_aps,
    kinds_of_errors,
    match_predictions,
)
from nl_detectron.analysis.attention_page import data_url
from nl_detectron.config import build_config
from nl_detectron.data.coco_format import Record
from nl_detectron.data.coco_records import read_completed
from nl_detectron.engine.command_line import Parser, exit_on_user_error, positive_int
from nl_detectron.engine.drawing import draw_annotations, side_by_side
from nl_detectron.engine.setup import check_datasets, register_datasets
from nl_detectron.files import check_target

PREDICTIONS = "inference/coco_instances_results.json"
NUM_PICTURES = 8  # that B wins, and that B loses
MIN_SCORE = 0.5  # to be drawn
MAX_SIZE = 2400  # pixels, of three pictures side by side


Table = list[list[object]]
"""Rows, the headers first."""


class EvaluatedRun(NamedTuple):
    predictions: list[Record]
    aps: AveragePrecisions
    errors: Errors | None


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_with_overrides(arguments)
    if args.json:
        sources = [run / PREDICTIONS for run in (args.run_a, args.run_b)]
        check_target("--json", args.json, sources, overwrite=args.overwrite)
    cfg = common_config(args)
    dataset = cfg.DATASETS.TEST[-1]  # each evaluation replaces the predictions of the one before
    records = {record["image_id"]: record for record in DatasetCatalog.get(dataset)}
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it makes an index
        truth = COCO()
        truth.dataset = read_completed(MetadataCatalog.get(dataset).json_file)
        truth.createIndex()
    runs = [load_run(folder, truth, cfg, args) for folder in (args.run_a, args.run_b)]
    a, b = runs
    differences = compare_aps(a.aps, b.aps, args.resamples)
    about = (
        f"A is {args.run_a}, B is {args.run_b}; {args.task} on {dataset}, "
        f"{len(records)} pictures, {args.resamples} resamples of them."
    )
    tables = [ap_table(differences), *error_tables(runs)]
    print("\n\n".join([about, *(tabulate(t, "firstrow", floatfmt=".1f") for t in tables)]))
    print(f"\n{(said := verdict(runs))}".rstrip())
    if args.json:
        args.json.write_text(json.dumps(summary(runs, differences), indent=2), encoding="utf-8")
    if args.output:
        pictures = draw_pictures(runs, dataset, records)
        print(f"\n{write_page(args.output, about, said, tables, pictures)}")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run_a", type=Path, metavar="RUN_A")
    parser.add_argument("run_b", type=Path, metavar="RUN_B")
    parser.add_argument("--task", choices=FIELDS, default="bbox", help="default: %(default)s")
    parser.add_argument(
        "--resamples", type=positive_int, default=1000, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--no-errors", action="store_true", help="no kinds of errors, no tidecv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write index.html there")
    parser.add_overwrite()
    parser.add_overrides()
    return parser


def common_config(args: argparse.Namespace) -> CfgNode:
    """That of B, if both runs were evaluated on the same data."""
    folders = (args.run_a, args.run_b)
    a, b = (build_config(folder / "config.yaml", args.opts) for folder in folders)
    for data in ([cfg.DATASETS.TEST for cfg in (a, b)], [c.DATASETS.OWN.VAL_JSON for c in (a, b)]):
        if data[0][-1:] != data[1][-1:]:
            raise ValueError(f"{args.run_a} was evaluated on {data[0]}, {args.run_b} on {data[1]}")
    register_datasets(b, eval_only=True)
    check_datasets(b, eval_only=True)
    return b


def load_run(folder: Path, truth: COCO, cfg: CfgNode, args: argparse.Namespace) -> EvaluatedRun:
    file = folder / PREDICTIONS
    try:
        predictions = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} does not exist; an evaluation writes it") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if any(FIELDS[args.task] not in p for p in predictions):
        raise ValueError(f"--task is {args.task}, but {file} has predictions without that")
    matches = match_predictions(truth, predictions, args.task, cfg.TEST.KEYPOINT_OKS_SIGMAS)
    errors = None
    if args.task != "keypoints" and not args.no_errors:  # TIDE knows boxes and masks
        errors = kinds_of_errors(truth, predictions, args.task)
    return EvaluatedRun(predictions, AveragePrecisions(matches), errors)


def ap_table(differences: dict[str, Difference]) -> Table:
    rows: Table = [["AP (%)", "A", "B", "B - A", "95 % interval", "pictures"]]
    for name, d in differences.items():
        if not np.isnan(d.a):
            rows.append([name, d.a, d.b, d.b - d.a, f"{d.low:+.1f} ... {d.high:+.1f}", d.pictures])
    return rows


def error_tables(runs: Sequence[EvaluatedRun]) -> list[Table]:
    """Kinds of errors, and the classes that are confused; none where they are not looked for."""
    if not (a := runs[0].errors) or not (b := runs[1].errors):
        return []
    kinds: Table = [["AP50 to gain without errors", "A", "B", "B - A"]]
    for kind, name in KINDS.items():
        kinds.append([name, a.kinds[kind], b.kinds[kind], b.kinds[kind] - a.kinds[kind]])
    confused: Table = [["objects that score highest as another class", "A", "B", "B - A"]]
    for pair in most_confused(a, b):
        x, y = a.confusions[pair], b.confusions[pair]
        confused.append([f"{pair[0]} as {pair[1]}", x, y, y - x])
    return [kinds, confused] if len(confused) > 1 else [kinds]


def most_confused(a: Errors, b: Errors, number: int = 10) -> list[tuple[str, str]]:
    return [pair for pair, _ in (a.confusions + b.confusions).most_common(number)]


def verdict(runs: Sequence[EvaluatedRun]) -> str:
    """On the kinds of errors that B makes less and more often than A; empty if not looked for."""
    if not (a := runs[0].errors) or not (b := runs[1].errors):
        return ""
    change = {kind: b.kinds[kind] - a.kinds[kind] for kind in KINDS}
    said = []
    for verb, sign in (("removes", -1), ("adds", 1)):
        kind = max(KINDS, key=lambda kind: sign * change[kind])
        if sign * change[kind] <= 0:
            said.append(f"B {verb} no kind of error.")
            continue
        text = (
            f"B {verb} most of: {KINDS[kind]} ({a.kinds[kind]:.1f} to {b.kinds[kind]:.1f} points)"
        )
        for pair in most_confused(a, b):
            x, y = a.confusions[pair], b.confusions[pair]
            if kind == "Cls" and sign * (y - x) > 0:
                text += f"; {pair[0]} taken for {pair[1]}: {x} to {y} objects"
        said.append(f"{text}.")
    return " ".join(said)


def summary(runs: Sequence[EvaluatedRun], differences: dict[str, Difference]) -> dict[str, object]:
    """For JSON, which has no NaN: APs without objects are left out."""
    aps = {name: d._asdict() for name, d in differences.items() if not np.isnan(d.a)}
    errors = [
        {"kinds": e.kinds, "confusions": [[*pair, n] for pair, n in e.confusions.most_common()]}
        for e in (run.errors for run in runs)
        if e
    ]
    return {"APs": aps, "errors": dict(zip("ab", errors))}


def draw_pictures(runs: Sequence[EvaluatedRun], dataset: str, records: dict[int, Record]) -> str:
    """HTML: the pictures whose APs differ most, first those that B wins."""
    aps = np.stack([run.aps.of_pictures() for run in runs])
    gains = np.nan_to_num(aps[1] - aps[0])
    order = np.argsort(-gains, kind="stable")
    parts = []
    for title, chosen in (
        ("Pictures that B wins", [i for i in order if gains[i] > 0]),
        ("Pictures that B loses", [i for i in order[::-1] if gains[i] < 0]),
    ):
        parts.append(f"<h2>{title}: {len(chosen)}</h2>")
        for i in chosen[:NUM_PICTURES]:
            record = records[runs[0].aps.image_ids[i]]
            url = data_url(draw_triple(record, runs, dataset, aps[:, i]), MAX_SIZE)
            name = escape(Path(record["file_name"]).name)
            image = f'<img src="{url}" alt="truth, A and B in {name}">'
            enlarged = f'<label><input type="checkbox" aria-label="enlarge {name}">{image}</label>'
            parts.append(f"<figure>{enlarged}<figcaption>{name}</figcaption></figure>")
    return "\n".join(parts)


def draw_triple(
    record: Record, runs: Sequence[EvaluatedRun], dataset: str, aps: np.ndarray
) -> np.ndarray:
    """The truth, A and B side by side: (H, W, 3), uint8, RGB."""
    image, metadata = read_image(record["file_name"], "BGR"), MetadataCatalog.get(dataset)
    classes = metadata.thing_dataset_id_to_contiguous_id
    found = [
        [
            {**p, "category_id": classes[p["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
            for p in run.predictions
            if p["image_id"] == record["image_id"] and p["score"] >= MIN_SCORE
        ]
        for run in runs
    ]
    parts = {key for run in runs for prediction in run.predictions[:1] for key in prediction}
    parts &= {"segmentation", "keypoints"}
    scale = max(1, MAX_SIZE // (3 * image.shape[1]))
    pictures = [
        draw_annotations(image, annotations, metadata, scale, parts)
        for annotations in (record["annotations"], *found)
    ]
    captions = [f"{name}: AP {ap:.0f}" for name, ap in zip("AB", aps)]
    return side_by_side(pictures, ["truth", *captions])[:, :, ::-1]


def write_page(folder: Path, about: str, said: str, tables: list[Table], pictures: str) -> Path:
    """Returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title="Comparison of two runs",
        about=escape(about),
        verdict=escape(said),
        min_score=f"{MIN_SCORE:.0%}",
        tables="\n".join(tabulate(t, "firstrow", "html", floatfmt=".1f") for t in tables),
        pictures=pictures,
    )
    file = folder / "index.html"
    file.write_text(page, encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
