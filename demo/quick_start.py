"""Train a small detector with non-local blocks, and show what it learnt in a page (`make demo`).

    $ tools/quick_start.py                    # after an interruption, too: it goes on
    $ tools/quick_start.py --skip-training    # write the page again

That is the detector of configs/quick_start.yaml, with its blocks and without; KEY VALUE pairs
override its config, as for train_net.py. Beside them two are trained that have to find one disc
among four at the other end of the picture (lab/studies/long_range_match.yaml), one with a block.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import nl_detectron  # noqa: F401  first: keeps warnings of Detectron2 away

# isort: split
import cv2
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image

from demo.proof import PROOF_SETTINGS, SCALE, draw_proof
from lab.study.__main__ import train_command
from lab.study.plan import TrainingRun, load_plan
from lab.study.runner import LOG, prepare_runs, run_all
from nl_detectron.analysis.block_report import inspect_records
from nl_detectron.analysis.curves import plot_metrics
from nl_detectron.analysis.metrics import TASKS, last_aps, metrics_file
from nl_detectron.config import build_config
from nl_detectron.data.coco_format import Record
from nl_detectron.engine.command_line import Parser, exit_on_user_error
from nl_detectron.engine.drawing import draw_annotations, side_by_side
from nl_detectron.engine.predictor import Predictor, trained_config
from nl_detectron.modeling import nonlocal_blocks

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = ROOT / "configs" / "quick_start.yaml"
PROOF = ROOT / "lab" / "studies" / "long_range_match.yaml"
NUM_PICTURES = 6
NUM_LOOKED_AT = 24  # to choose the pictures from
NUM_INSPECTED = 4  # as many as tools/inspect_blocks.py looks at
MIN_SCORE = 0.5
WITHOUT = "without_blocks"  # the folder of the same detector without them


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a training failed."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--skip-training", action="store_true", help="show what was trained in OUTPUT_DIR before"
    )
    parser.add_overrides()
    args = parser.parse_with_overrides(arguments)
    cfg = build_config(CONFIG_FILE, args.opts)
    output, minutes = Path(cfg.OUTPUT_DIR), None
    if not args.skip_training:
        runs = plan_runs(cfg, output)
        todo = prepare_runs(runs)
        is_new = not any(metrics_file(run.folder).is_file() for run in runs)
        start = time.perf_counter()
        try:
            if todo and train(todo, train_command(1, args.project), is_new):
                return 1
        except (KeyboardInterrupt, asyncio.CancelledError):
            parser.exit(130, f"{parser.prog}: stopped; the same command goes on\n")
        minutes = (time.perf_counter() - start) / 60 if is_new else None
    try:
        cfg = trained_config(str(output / "config.yaml"), str(output / "model_final.pth"))
    except FileNotFoundError as error:
        parser.error(f"{error}; it comes from training")
    write_page(cfg, output, minutes)
    print_summary(cfg, output, minutes)
    return 0


def plan_runs(cfg: CfgNode, output: Path) -> list[TrainingRun]:
    """
    The detector of the page, in ``output`` itself; the models of the proof; and the detector
    without blocks.
    """
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = ""
    detector = TrainingRun("quick_start", cfg.SEED, output, cfg.dump())
    cfg.MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE = [[], [], [], []]
    cfg.MODEL.NONLOCAL.AFTER_MODULES = []
    cfg.MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY = 0
    without = TrainingRun(WITHOUT, cfg.SEED, output / WITHOUT, cfg.dump())
    proof = load_plan(PROOF).part(list(PROOF_SETTINGS), [1]).runs(output / "proof")
    return [detector, *proof, without]


def train(runs: Sequence[TrainingRun], command: Sequence[str], is_new: bool) -> list[TrainingRun]:
    """
    Two at a time: two processes of one thread each take less time than two threads of one. Returns
    those that failed.
    """
    text = "up to 15 minutes on two cores" if is_new else "what was interrupted goes on"
    print(f"Small models are trained, {len(runs)} of 4: {text}. Each has a {LOG}:", flush=True)
    print(*(f"    {run.folder / LOG}" for run in runs), sep="\n", flush=True)
    return run_all(runs, command, workers=2)


def write_page(cfg: CfgNode, output: Path, minutes: float | None) -> None:
    """
    Write ``index.html`` and its pictures, of the trained model of a config and the folder that it
    was trained in; ``minutes`` is how long that took, if known.
    """
    dataset = cfg.DATASETS.TEST[0]
    blocks = describe_blocks(Predictor(cfg), DatasetCatalog.get(dataset), output)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = MIN_SCORE
    predictor = Predictor(cfg)
    records = [r for r in DatasetCatalog.get(dataset) if len(r["annotations"]) > 2]
    names = list(nonlocal_blocks(predictor.model))
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        dataset=dataset,
        blocks=", ".join(f"<code>{escape(name)}</code>" for name in names) or "none",
        learnt=blocks,
        results=results(output, minutes),
        min_score=f"{MIN_SCORE:.0%}",
        proof=draw_proof(output),
        pictures=draw_pictures(predictor, records, output),
        commands=escape(commands(output)),
    )
    runs = {"with blocks": output, "without blocks": output / WITHOUT}
    curves = {name: folder for name, folder in runs.items() if metrics_file(folder).is_file()}
    plot_metrics(curves).savefig(output / "curves.png", dpi=100)
    (output / "index.html").write_text(page, encoding="utf-8")


def results(output: Path, minutes: float | None) -> str:
    """HTML: the APs with blocks and without, and the time."""
    aps = last_aps(output)
    without = last_aps(output / WITHOUT) if metrics_file(output / WITHOUT).is_file() else {}
    tiles = []
    for task, name in TASKS.items():
        if (key := f"{task}/AP") in aps:
            than = f"; without blocks {without[key]:.1f}" if key in without else ""
            tiles.append(
                f"<div>{name} AP<b>{aps[key]:.1f}</b><small>with blocks{than}</small></div>"
            )
    if minutes is not None:
        tiles.append(f"<div>minutes<b>{minutes:.1f}</b><small>to train and evaluate</small></div>")
    return "\n".join(tiles)


def draw_pictures(predictor: Predictor, records: Sequence[Record], output: Path) -> str:
    """
    Write ground truth and predictions side by side, PNGs of some records, first those in which
    something is found; HTML showing them.
    """

    def finds_nothing(record: Record) -> bool:
        return not len(predictor(read_image(record["file_name"], "BGR"))["instances"])

    (output / "predictions").mkdir(exist_ok=True)
    figures = []
    for record in sorted(records[:NUM_LOOKED_AT], key=finds_nothing)[:NUM_PICTURES]:
        image = read_image(record["file_name"], "BGR")
        truth = draw_annotations(image, record["annotations"], predictor.metadata, SCALE)
        prediction = predictor.draw(image, SCALE)
        picture = side_by_side([truth, prediction], ["ground truth", "prediction"])
        name = f"predictions/{Path(record['file_name']).stem}.png"
        cv2.imwrite(str(output / name), picture)
        figures.append(f'<figure><img src="{name}" alt="ground truth and prediction"></figure>')
    return "\n".join(figures)


def describe_blocks(predictor: Predictor, records: Sequence[Record], output: Path) -> str:
    """HTML: a sentence on each block, and the command that says the same."""
    reports = inspect_records(predictor, records[:NUM_INSPECTED])
    if not reports:  # which only overrides can bring about
        return ""
    sentences = " ".join(f"<code>{escape(r.block)}</code>: {escape(r.sentence())}" for r in reports)
    command = f"tools/inspect_blocks.py {output}/model_final.pth"
    return f"<p>{sentences} So says <code>{escape(command)}</code>, too.</p>"


def commands(output: Path) -> str:
    """What to go on with."""
    model = f"--config-file {output}/config.yaml"
    weights = output / "model_final.pth"
    return f"""{sys.executable} train_net.py --eval-only {model} MODEL.WEIGHTS {weights}
{sys.executable} demo/demo.py {model} --weights {weights} --input IMAGE
{sys.executable} demo/attention.py {model} --weights {weights} --input IMAGE"""


def print_summary(cfg: CfgNode, output: Path, minutes: float | None) -> None:
    """What was reached, and where it is."""
    time_taken = "" if minutes is None else f"Trained and evaluated in {minutes:.1f} minutes. "
    print(f"\n{time_taken}On {cfg.DATASETS.TEST[0]}:")
    aps = last_aps(output)
    for task, name in TASKS.items():
        if f"{task}/AP" in aps:
            print(f"  {name} AP {aps[f'{task}/AP']:.1f}")
    print(
        f"""
Page with pictures and curves         {output / "index.html"}
Weights                               {output / "model_final.pth"}
Losses and APs, a line of JSON each   {metrics_file(output)}
Predictions in COCO's format          {output / "inference"}
The whole log, and the whole config   {output / "log.txt"}, config.yaml
Curves                                tensorboard --logdir {output}

Evaluate it again; draw what it finds in images; see what points attend to:
{commands(output)}"""
    )


if __name__ == "__main__":
    sys.exit(main())
