"""Built-in datasets in COCO's format: drawn into Detectron2's cache when they are first used."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock, get_cache_dir
from PIL import Image

from nl_detectron.data.coco_format import Record

logger = logging.getLogger(__name__)

Draw = Callable[[np.random.Generator], tuple[Image.Image, list[Record]]]
"""Draws a picture from random numbers; returns it and its annotations, which have no ids yet."""


def make_dataset(
    root: Path,
    name: str,
    draw: Draw,
    categories: list[Record],
    num_train: int,
    num_val: int,
    draw_val: Draw | None = None,
) -> Path:
    """
    Draw a dataset, ``{train,val}.json`` in COCO's format and ``{train,val}/*.png``, and return
    ``root``. Picture i of a split is the same on every machine.

    Everything is made in a folder beside ``root`` that takes its name when complete; a complete
    ``root`` is left as it is, and one with something else is a FileExistsError. Of processes that
    start at once, one draws and the others wait. ``draw_val`` draws for validation, if not
    ``draw``.
    """
    complete = root / "val.json"
    if complete.exists():
        return root
    if root.exists():
        raise FileExistsError(
            f"{root} exists but holds no {name}; delete it or name another folder"
        )
    with _one_at_a_time(root):
        if not complete.exists():
            splits = {"train": (num_train, draw), "val": (num_val, draw_val or draw)}
            _make(root, name, splits, categories)
    return root


def _make(
    root: Path, name: str, splits: dict[str, tuple[int, Draw]], categories: list[Record]
) -> None:
    counts = " + ".join(str(num_images) for num_images, _ in splits.values())
    logger.info(f"Drawing {counts} images of {name} into {root} ...")
    for left in root.parent.glob(f"{root.name}.{'[0-9a-f]' * 32}"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    draft = root.with_name(f"{root.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        for seed, (split, (num_images, draw)) in enumerate(splits.items()):
            coco = {
                "info": {"description": f"nl_detectron {name}", "version": "1"},
                "licenses": [],
                **_make_split(draft / split, seed, num_images, draw),
                "categories": categories,
            }
            (draft / f"{split}.json").write_text(json.dumps(coco))
        draft.rename(root)
    except OSError:
        if not (root / "val.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """One process after the other; nothing is left behind."""
    with file_lock(str(path)):
        try:
            yield
        finally:
            # A process that comes now may overtake those that wait; the renaming bears it.
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


def register_dataset(
    name: str,
    root: Path,
    make: Callable[[Path], Path],
    annotation_keys: Sequence[str] = (),
    **metadata: Any,
) -> None:
    """
    Register ``{name}_train`` and ``_val``, anew if need be, to be made by ``make(root)`` on first
    use.

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
                i + 1: i for i in range(len(metadata["thing_classes"]))
            },
            json_file=f"{folder}.json",
            image_root=folder,
            evaluator_type="coco",
        )


def cache_folder(name: str) -> Path:
    """The path of a folder in Detectron2's cache (``$FVCORE_CACHE``); it need not exist."""
    return Path(get_cache_dir()) / "nl_detectron" / name


def _make_split(folder: Path, seed: int, num_images: int, draw: Draw) -> Record:
    """Draw the pictures of a split into ``folder``; return COCO's images and annotations."""
    folder.mkdir()
    images: list[Record] = []
    annotations: list[Record] = []
    for image_id in range(1, num_images + 1):
        picture, annotations_of_picture = draw(np.random.default_rng([seed, image_id]))
        file_name = f"{image_id:06d}.png"
        picture.save(folder / file_name)
        width, height = picture.size
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for annotation in annotations_of_picture:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append(ids | annotation)
    return {"images": images, "annotations": annotations}
