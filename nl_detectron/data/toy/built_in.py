"""Built-in datasets in COCO's format: drawn into Detectron2's cache when they are first used."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock, get_cache_dir
from PIL import Image

from nl_detectron.data.coco_format import Record

logger = logging.getLogger(__name__)

Draw = Callable[[np.random.Generator, str], tuple[Image.Image, list[Record]]]
"""Draws a picture of "train" or "val"; returns it and its annotations, which have no ids yet."""


def make_dataset(
    root: str | Path, name: str, draw: Draw, categories: list[Record], num_images: dict[str, int]
) -> Path:
    """Draw a dataset, ``{train,val}.json`` in COCO's format and ``{train,val}/*.png``, and return
    ``root``. Picture i of a split is the same on every machine.

    Everything is made in a folder beside ``root`` that takes its name when complete; a complete
    ``root`` is left as it is, and one with something else is a FileExistsError. Of processes that
    start at once, one draws and the others wait.
    """
    root = Path(root)
    complete = root / "val.json"
    if root.exists() and not complete.exists():
        raise FileExistsError(
            f"{root} exists but holds no {name}; delete it or name another folder"
        )
    if complete.exists():
        return root
    with file_lock(str(root)):
        try:
            if not complete.exists():
                _make(root, name, draw, categories, num_images)
        finally:
            # A process that comes now may overtake those that wait; the renaming bears it.
            root.with_name(f"{root.name}.lock").unlink(missing_ok=True)
    return root


def _make(
    root: Path, name: str, draw: Draw, categories: list[Record], num_images: dict[str, int]
) -> None:
    counts = " + ".join(map(str, num_images.values()))
    logger.info(f"Drawing {counts} images of {name} into {root} ...")
    for left in root.parent.glob(f"{root.name}.{'[0-9a-f]' * 32}"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    draft = root.with_name(f"{root.name}.{uuid.uuid4().hex}")
    try:
        for seed, (split, count) in enumerate(num_images.items()):
            coco = {
                "info": {"description": f"nl_detectron {name}", "version": "1"},
                "licenses": [],
                **_draw_split(draft / split, seed, count, draw),
                "categories": categories,
            }
            (draft / f"{split}.json").write_text(json.dumps(coco))
        draft.rename(root)
    except OSError:
        if not (root / "val.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draw_split(folder: Path, seed: int, num_images: int, draw: Draw) -> Record:
    """Draw the pictures of a split into a folder of its name; return its images and annotations."""
    folder.mkdir(parents=True)
    images: list[Record] = []
    annotations: list[Record] = []
    for image_id in range(1, num_images + 1):
        picture, drawn = draw(np.random.default_rng([seed, image_id]), folder.name)
        file_name = f"{image_id:06d}.png"
        picture.save(folder / file_name)
        width, height = picture.size
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for annotation in drawn:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    return {"images": images, "annotations": annotations}


def register_dataset(
    name: str,
    root: Path,
    make: Callable[[Path], Path],
    annotation_keys: Sequence[str] = (),
    **metadata: Any,
) -> None:
    """Register ``{name}_train`` and ``_val``, anew if need be, to be made by ``make(root)`` on
    first use.

    ``annotation_keys`` are what annotations have beside COCO's keys; ``metadata`` is for
    Detectron2's ``MetadataCatalog`` and has ``thing_classes``.
    """
    for split in (f"{name}_train", f"{name}_val"):
        folder = str(root / split.rpartition("_")[2])

        def load(split: str = split, folder: str = folder) -> list[Record]:
            make(root)
            return load_coco_json(f"{folder}.json", folder, split, annotation_keys)

        DatasetCatalog.pop(split, None)
        DatasetCatalog.register(split, load)
        MetadataCatalog.pop(split, None)
        MetadataCatalog.get(split).set(
            **metadata,
            thing_dataset_id_to_contiguous_id={
                i: i - 1 for i, _ in enumerate(metadata["thing_classes"], start=1)
            },
            json_file=f"{folder}.json",
            image_root=folder,
            evaluator_type="coco",
        )


def cache_folder(name: str) -> Path:
    """The path of a folder in Detectron2's cache (``$FVCORE_CACHE``); it need not exist."""
    return Path(get_cache_dir()) / "nl_detectron" / name
