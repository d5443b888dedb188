#!/usr/bin/env python3
"""What starting on data of COCO's size costs: our start, with its checks, and Detectron2's own take
turns, each in a process of its own. The data are the images of a small dataset, many times over.

    $ tests/start_cost.py ../shared/data/coco/annotations/instances_train2017.json \\
          ../shared/data/coco/train2017 --rounds 3
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STARTS = ("Detectron2", "nl_detectron")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json_file", type=Path, help="annotations in COCO's format")
    parser.add_argument("image_root", type=Path)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--annotations", type=int, default=860_000)
    parser.add_argument(
        "--without", nargs="*", default=[], help="fields to leave out, such as area"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start", choices=STARTS, help="of this process; not for people")
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start, args.json_file, args.image_root)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repeat(args, folder)
        size = (folder / "train.json").stat().st_size / 1e6
        print(f"{args.images} images, {args.annotations} annotations, {size:.0f} MB")
        runs = {which: [] for which in STARTS}
        for which in itertools.islice(itertools.cycle(STARTS), 2 * args.rounds):
            command = [sys.executable, __file__, folder / "train.json", folder / "images"]
            lines = subprocess.check_output([*command, "--start", which], text=True).splitlines()
            runs[which].append(json.loads(lines[-1]))
            print(which, *(f"{key} {value:.2f}" for key, value in runs[which][-1].items()))
    for key in runs[STARTS[0]][0]:
        theirs, ours = (statistics.median(run[key] for run in runs[which]) for which in STARTS)
        print(f"{key}: {theirs:.2f} and {ours:.2f}, {ours / theirs:.2f} x")


def repeat(args: argparse.Namespace, folder: Path) -> None:
    """Write train.json, val.json, and images/, where each file has many names."""
    coco = json.loads(args.json_file.read_text())
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    (folder / "images").mkdir()
    for image in coco["images"]:
        shutil.copy(args.image_root / image["file_name"], folder)
    images, annotations = [], []
    for i, image in enumerate(itertools.islice(itertools.cycle(coco["images"]), args.images), 1):
        file_name = f"{i:012}.jpg"
        os.link(folder / image["file_name"], folder / "images" / file_name)
        images.append({**image, "id": i, "file_name": file_name})
        room = round(i * args.annotations / args.images) - len(annotations)
        for annotation in of_image[image["id"]][:room]:
            annotation = {k: v for k, v in annotation.items() if k not in args.without}
            ids = {"image_id": i, "id": len(annotations) + 1}
            annotations.append({**annotation, **{k: ids[k] for k in ids if k in annotation}})
    coco = {**coco, "images": images, "annotations": annotations}
    (folder / "train.json").write_text(json.dumps(coco))
    few = {image["id"] for image in images[:50]}
    coco = {**coco, "images": images[:50]}
    coco["annotations"] = [a for a in annotations[:5000] if a["image_id"] in few]
    (folder / "val.json").write_text(json.dumps(coco))


def start(which: str, json_file: Path, image_root: Path) -> dict[str, float]:
    """Wall and CPU seconds from the JSON file to a loader, and the peak of this process in GB."""
    from detectron2.config import get_cfg
    from detectron2.data import build_detection_train_loader
    from detectron2.data.datasets import register_coco_instances

    from nl_detectron.data import build_train_loader
    from nl_detectron.engine.setup import use_own_data

    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    val_json = json_file.with_name("val.json")
    begin, cpu = time.perf_counter(), time.process_time()
    if which == "Detectron2":
        register_coco_instances("train", {}, str(json_file), str(image_root))
        register_coco_instances("val", {}, str(val_json), str(image_root))
        cfg.DATASETS.TRAIN = ("train",)
        loader = build_detection_train_loader(cfg)
    else:
        use_own_data(cfg, str(json_file), str(image_root), str(val_json), str(image_root))
        loader = build_train_loader(cfg)
    seconds = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
    del loader
    return {**seconds, "GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


if __name__ == "__main__":
    main()
