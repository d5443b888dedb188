#!/usr/bin/env python3
"""Train and evaluate configs/quick_start.yaml and draw what it predicts (`make demo`).

KEY VALUE pairs on the command line override the config's, as for train_net.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer

from nl_detectron import add_nonlocal_config

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = ROOT / "configs" / "quick_start.yaml"
NUM_PICTURES = 6
MIN_SCORE = 0.6
SCALE = 3  # the images are small


def main() -> None:
    overrides = sys.argv[1:]
    if set(overrides) & {"-h", "--help"}:
        sys.exit(__doc__)
    start = time.perf_counter()
    train_net = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(CONFIG_FILE)]
    if status := subprocess.run([*train_net, *overrides]).returncode:
        sys.exit(status)
    minutes = (time.perf_counter() - start) / 60

    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(str(CONFIG_FILE), allow_unsafe=False)
    cfg.merge_from_list(overrides)
    output = Path(cfg.OUTPUT_DIR)
    trained = get_cfg()
    add_nonlocal_config(trained)
    trained.merge_from_file(str(output / "config.yaml"), allow_unsafe=False)
    pictures = draw_predictions(trained, output / "predictions")

    print(f"\nTrained and evaluated in {minutes:.1f} minutes. On {trained.DATASETS.TEST[0]}:")
    for task, name in (("bbox", "box"), ("segm", "mask"), ("keypoints", "keypoint")):
        print(f"  {name} AP {last_metric(output / 'metrics.json', f'{task}/AP'):.1f}")
    print(
        f"""
Pictures (ground truth left, prediction right)  {pictures}
Weights                                         {output / "model_final.pth"}
Losses and APs, a line of JSON each             {output / "metrics.json"}
Predictions in COCO's format                    {output / "inference"}
The whole log, and the whole config             {output / "log.txt"}, config.yaml
Curves                                          tensorboard --logdir {output}

Evaluate it again:
  {sys.executable} train_net.py --config-file {CONFIG_FILE.relative_to(ROOT)} --eval-only \\
    MODEL.WEIGHTS {output / "model_final.pth"}"""
    )


def last_metric(metrics_file: Path, key: str) -> float:
    """The last value of a metric in the file that Detectron2 writes a line of JSON to."""
    records = map(json.loads, metrics_file.read_text().splitlines())
    return [record[key] for record in records if key in record][-1]


def draw_predictions(cfg: CfgNode, folder: Path) -> Path:
    """Draw the first validation images that have several objects: one PNG each, one of all."""
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    predict = DefaultPredictor(cfg)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    records = [r for r in DatasetCatalog.get(cfg.DATASETS.TEST[0]) if len(r["annotations"]) > 2]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for record in records[:NUM_PICTURES]:
        image = cv2.imread(record["file_name"])
        found = predict(image)["instances"].to("cpu")
        found = found[found.scores > MIN_SCORE]
        rgb = image[:, :, ::-1]
        truth = Visualizer(rgb, metadata, SCALE, ColorMode.SEGMENTATION).draw_dataset_dict(record)
        prediction = draw_instances(Visualizer(rgb, metadata, SCALE), found)
        picture = side_by_side([canvas.get_image()[:, :, ::-1] for canvas in (truth, prediction)])
        cv2.imwrite(str(folder / f"{Path(record['file_name']).stem}.png"), picture)
        pictures.append(picture)
    rows = [side_by_side(pictures[i : i + 2], gap=32) for i in range(0, len(pictures), 2)]
    cv2.imwrite(
        str(folder / "all.png"),
        side_by_side([r.swapaxes(0, 1) for r in rows], gap=16).swapaxes(0, 1),
    )
    return folder / "all.png"


def draw_instances(visualizer: Visualizer, found: Instances) -> VisImage:
    """Draw predictions in the colours of their classes, holes in masks left open."""
    metadata = visualizer.metadata
    classes = found.pred_classes.tolist()
    colors = [tuple(np.divide(metadata.thing_colors[i], 255)) for i in classes]
    for mask, color in zip(found.pred_masks.numpy(), colors):
        visualizer.draw_binary_mask(mask.astype("uint8"), color, alpha=0.5)
    return visualizer.overlay_instances(
        boxes=found.pred_boxes,
        labels=[
            f"{metadata.thing_classes[i]} {score:.0%}"
            for i, score in zip(classes, found.scores.tolist())
        ],
        keypoints=found.pred_keypoints,
        assigned_colors=colors,
    )


def side_by_side(pictures: list[np.ndarray], gap: int = 4) -> np.ndarray:
    """Pictures (height, width, 3) of any sizes, from left to right on white."""
    height = max(picture.shape[0] for picture in pictures)
    columns = [np.full((height, gap, 3), 255, np.uint8)]
    for picture in pictures:
        below = height - picture.shape[0]
        column = np.pad(picture, ((0, below), (0, 0), (0, 0)), constant_values=255)
        columns += [column, columns[0]]
    return np.hstack(columns[1:-1])


if __name__ == "__main__":
    main()
