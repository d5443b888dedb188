"""What the demo opens with: squares that a detector gets wrong without a block, right with one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from torchvision.ops import nms

from nl_detectron.analysis.attention import AttentionRecord, record_attention
from nl_detectron.analysis.attention_figure import draw_attention
from nl_detectron.analysis.attention_map import AttentionMap
from nl_detectron.analysis.metrics import last_aps
from nl_detectron.data.coco_format import Record
from nl_detectron.data.long_range_match import load_with_partners
from nl_detectron.engine.drawing import draw_ground_truth, draw_predictions, stacked
from nl_detectron.engine.predictor import Predictor, trained_config

PROOF_SETTINGS = {"baseline": "without a block", "nl": "with a non-local block"}
"""Settings of studies/long_range_match.yaml, and what they are called."""

SCALE = 3  # the images are small
NUM_PROOFS = 1  # pictures
NUM_INSPECTED = 16


def draw_proof(output: Path) -> str:
    """Write proof.png, what a model without a block gets wrong and one with a block right; HTML."""
    folders = [output / "proof" / setting / "seed_1" for setting in PROOF_SETTINGS]
    if not all((folder / "model_final.pth").is_file() for folder in folders):
        return ""  # of a run of --skip-training that had no proof
    baseline, nonlocal_ = (
        Predictor(trained_config(str(folder / "config.yaml"), str(folder / "model_final.pth")))
        for folder in folders
    )
    records = load_with_partners(nonlocal_.cfg.DATASETS.TEST[0])
    pictures, captions = [], []
    for record in records:
        image = read_image(record["file_name"], "BGR")
        wrong = wrong_objects(baseline, image, record)
        if not wrong or wrong_objects(nonlocal_, image, record):
            continue
        attended = maps_of_squares(nonlocal_, image, wrong[:1])
        if not is_on_partner(attended.blocks[0].maps[0], wrong[0]):
            continue
        pictures.append(draw_ground_truth(image, record, nonlocal_.metadata, SCALE, parts=()))
        pictures += [draw_best(predictor, image) for predictor in (baseline, nonlocal_)]
        file = output / "proof_attention.png"
        draw_attention(attended, arrows=1).savefig(file, bbox_inches="tight")
        pictures.append(fitted(read_image(str(file), "BGR"), pictures[0].shape[1]))
        captions += ["truth", *PROOF_SETTINGS.values(), "what a square that was wrong attends to"]
        if len(pictures) == 4 * NUM_PROOFS:
            break
    if not pictures:
        return "<p>No picture was found that only the model with a block gets right.</p>"
    cv2.imwrite(str(output / "proof.png"), stacked(pictures, captions))
    figures = " and ".join(
        f"{last_aps(folder)['bbox/AP50']:.0f} {text}"
        for folder, text in zip(folders, PROOF_SETTINGS.values())
    )
    return (
        "<p>Whether a square is <i>bright</i> or <i>dark</i> only the disc of its own hue tells, "
        f"one of four, 180 pixels away. Box AP50: {figures}; to guess gives 50. "
        f"{describe_partners(nonlocal_, records[:NUM_INSPECTED])}</p>"
        '<figure><img src="proof.png" alt="wrong without a block, right with one"></figure>'
    )


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


def describe_partners(predictor: Predictor, records: Sequence[Record]) -> str:
    """A sentence on what the centres of the squares attend to, and whether that is right."""
    shares, is_right = [], []
    for record in records:
        squares = record["annotations"]
        image = read_image(record["file_name"], "BGR")
        for square, attended in zip(
            squares, maps_of_squares(predictor, image, squares).blocks[0].maps
        ):
            is_right.append(is_on_partner(attended, square))
            weights = torch.from_numpy(attended.weights)
            shares.append(torch.special.entr(weights).sum().exp().item() / weights.numel())
    return (
        f"In {len(records)} pictures a square attends to 1 place in {1 / np.mean(shares):.0f}, the "
        f"strongest on the right disc in {np.mean(is_right):.0%} of the cases."
    )


def maps_of_squares(predictor: Predictor, image: np.ndarray, squares: Sequence[Record]) -> Any:
    """What the centres of the squares attend to."""
    centers = [(x + w / 2, y + h / 2) for x, y, w, h in (square["bbox"] for square in squares)]
    return attention_of(predictor, image).maps(centers)


def is_on_partner(attended: AttentionMap, square: Record) -> bool:
    """
    Whether the strongest place is on the disc that tells the square's class; a square that attends
    to nothing but itself has no such place.
    """
    *center, radius = square["partner"]
    return any(math.dist(place, center) <= radius for place, _ in attended.strongest(1))


def attention_of(
    predictor: Predictor, image: np.ndarray, min_score: float = 0.5
) -> AttentionRecord:
    return record_attention(
        predictor.model,
        image,
        augmentation=predictor.aug,
        input_format=predictor.input_format,
        min_score=min_score,
    )


def fitted(picture: np.ndarray, width: int) -> np.ndarray:
    """A picture, (H, W, 3), of this width."""
    size = width, round(len(picture) * width / picture.shape[1])
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
