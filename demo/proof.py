"""What the demo opens with: squares that a detector gets wrong without a block, right with one."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from torchvision.ops import nms

from nl_detectron.analysis.attention import attention_of
from nl_detectron.analysis.attention_page import write_attention_page
from nl_detectron.analysis.metrics import last_aps
from nl_detectron.analysis.partner import (
    attention_at,
    center_of,
    describe_squares,
    inspect_squares,
)
from nl_detectron.analysis.placement import Point
from nl_detectron.data.coco_format import Record
from nl_detectron.engine.drawing import draw_annotations, draw_predictions, side_by_side
from nl_detectron.engine.predictor import Predictor, trained_config

PROOF_SETTINGS = {"baseline": "without a block", "nl": "with a non-local block"}
"""Settings of lab/studies/long_range_match.yaml, and what they are called."""

SCALE = 3  # the images are small
NUM_INSPECTED = 100


def draw_proof(output: Path) -> str:
    """
    Write proof.png, what a model without a block gets wrong and one with a block right, and
    proof.html, where its block looks; HTML.
    """
    folders = [output / "proof" / setting / "seed_1" for setting in PROOF_SETTINGS]
    if not all((folder / "model_final.pth").is_file() for folder in folders):
        return ""  # of a run of --skip-training that had no proof
    baseline, nonlocal_ = (
        Predictor(trained_config(str(folder / "config.yaml"), str(folder / "model_final.pth")))
        for folder in folders
    )
    records = DatasetCatalog.get(nonlocal_.cfg.DATASETS.TEST[0])
    for record in records:
        if (proof := proof_of(record, baseline, nonlocal_)) is not None:
            break
    else:
        return "<p>No picture was found that only the model with a block gets right.</p>"
    cv2.imwrite(str(output / "proof.png"), proof)
    attention = attention_of(nonlocal_, read_image(record["file_name"], "BGR"))
    write_attention_page(output / "proof.html", attention, title="Where the block looks")
    figures = " and ".join(
        f"{last_aps(folder)['bbox/AP50']:.0f} {text}"
        for folder, text in zip(folders, PROOF_SETTINGS.values())
    )
    (squares,) = inspect_squares(nonlocal_, records[:NUM_INSPECTED]).values()
    command = f"tools/inspect_blocks.py {folders[1]}/model_final.pth --num-images {NUM_INSPECTED}"
    return (
        "<p>Each square has the colour of one of the four discs at the other end. If that disc is "
        "bright, the square's class is <i>bright</i>, else <i>dark</i>. A detector that cannot see "
        f"the disc has to guess, and reaches a box AP50 of about 50. Here it is {figures}. "
        f"{describe_squares(squares)} So says <code>{escape(command)}</code>, too.</p>"
        '<figure><img src="proof.png" alt="wrong without a block, right with one">'
        "<figcaption>Each arrow ends in the middle of the disc on which the block's strongest "
        'weight is. <a href="proof.html">Move the pointer over the picture</a> to see the weights '
        "of any point.</figcaption></figure>"
    )


def proof_of(record: Record, baseline: Predictor, nonlocal_: Predictor) -> np.ndarray | None:
    """A picture; None if the baseline is right, or the other wrong or right by another disc."""
    image = read_image(record["file_name"], "BGR")
    wrong = wrong_objects(baseline, image, record)
    if not wrong or wrong_objects(nonlocal_, image, record):
        return None
    squares = record["annotations"]
    (attended,) = attention_at(attention_of(nonlocal_, image), squares).values()
    if not all(square.is_strongest_on_partner for square in attended):
        return None
    # The strongest key is one of the disc's; its centre need not be the disc's.
    arrows = [(center_of(square), square["partner"][:2]) for square in squares]
    pictures = {
        "truth": draw_annotations(image, squares, nonlocal_.metadata, SCALE, parts=()),
        f"{PROOF_SETTINGS['baseline']}: {len(wrong)} of {len(squares)} wrong": draw_best(
            baseline, image
        ),
        f"{PROOF_SETTINGS['nl']}: right, by looking there": draw_arrows(
            draw_best(nonlocal_, image), arrows
        ),
    }
    return side_by_side(list(pictures.values()), list(pictures), axis=0)


def draw_arrows(picture: np.ndarray, arrows: Sequence[tuple[Point, Point]]) -> np.ndarray:
    """A copy with arrows from point to point of the image that the picture shows."""
    picture = picture.copy()
    for arrow in arrows:
        start, end = np.rint(np.multiply(arrow, SCALE)).astype(int).tolist()
        for color, thickness in (((0, 0, 0), 5), ((255, 255, 255), 2)):
            cv2.arrowedLine(picture, start, end, color, thickness, cv2.LINE_AA, tipLength=0.02)
    return picture


def wrong_objects(predictor: Predictor, image: np.ndarray, record: Record) -> list[Record]:
    """The annotations for which the best prediction that fits has another class."""
    found = predictor(image)["instances"].to("cpu")
    boxes = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in record["annotations"]
    ]
    overlaps = pairwise_iou(Boxes(torch.tensor(boxes)), found.pred_boxes) >= 0.5
    return [
        annotation
        for annotation, fits in zip(record["annotations"], overlaps)
        if found.pred_classes[fits].tolist()[:1] != [annotation["category_id"]]
    ]


def draw_best(predictor: Predictor, image: np.ndarray) -> np.ndarray:
    """What is found, and of several classes in the same place the most confident."""
    found = predictor(image)["instances"].to("cpu")
    found = found[nms(found.pred_boxes.tensor, found.scores, 0.5)]
    return draw_predictions(image, found, predictor.metadata, SCALE)
