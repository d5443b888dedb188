"""Pictures of one size, in each of which two objects fill the halves: every region proposal lies on
an object, and every process has as many of each as any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64


def make_pictures(folder: Path, num_images: int = 16) -> list[str]:
    """Make a dataset in COCO's format; return the command-line options that name it."""
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        rng = np.random.default_rng(image_id)
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        middle = int(rng.integers(24, 41))
        for left, right in ((0, middle), (middle, SIZE)):
            pixels[:, left:right] //= rng.integers(1, 5, 3, dtype=np.uint8)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": 1 + len(annotations) % 2,
                "bbox": [left, 0, right - left, SIZE],
                "area": (right - left) * SIZE,
                "iscrowd": 0,
                "segmentation": [[left, 0, right, 0, right, SIZE, left, SIZE]],
            }
            annotations.append(annotation)
        Image.fromarray(pixels).save(folder / f"{image_id}.png")
        images.append(
            {"id": image_id, "file_name": f"{image_id}.png", "width": SIZE, "height": SIZE}
        )
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "all.json").write_text(json.dumps(content))
    json_file, image_folder = str(folder / "all.json"), str(folder)
    options = []
    for split in ("train", "val"):
        options += [f"--{split}-json", json_file, f"--{split}-images", image_folder]
    return options
