"""The built-in datasets ``shapes_train`` and ``shapes_val``, drawn when they are first used.

Small pictures of rings, triangles and squares in COCO's format: boxes, masks (with holes,
or cut up by nearer objects), crowd regions, and two keypoints on every object, a light dot at its
head and a dark dot at its tail. Picture i of a split is the same on every machine.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import get_cache_dir
from shapely.geometry import MultiPolygon, Point, Polygon

from nl_detectron.data.scene import (
    SHAPES,
    SceneObject,
    Size,
    draw_scene,
    hole_free_polygons,
    picture_frame,
    sample_scene,
)

logger = logging.getLogger(__name__)

KEYPOINT_NAMES = ["head", "tail"]
# For drawing annotations and predictions, in the order of SHAPES; the colour-blind can tell them.
CLASS_COLORS = [(230, 159, 0), (86, 180, 233), (204, 121, 167)]
IMAGE_SIZES = [(128, 128)] * 8 + [(96, 128), (128, 96), (128, 160), (160, 128)]  # height, width


def _segmentation(
    item: SceneObject, visible: list[Polygon], size: Size
) -> list[list[float]] | dict[str, Any]:
    """Lists of polygons [x1, y1, x2, y2, ...]; for a crowd an RLE, as in COCO."""
    polygons = [np.asarray(p.exterior.coords[:-1]).round(2).ravel().tolist() for p in visible]
    if item.axis is not None:
        return polygons
    rle = mask_util.merge(mask_util.frPyObjects(polygons, *size))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _keypoints(item: SceneObject, image: Polygon) -> list[float]:
    """COCO's [x, y, v] per point: v=2 visible, v=1 behind something nearer, v=0 not in the image.

    x and y are pixel indices (0.5 less than the coordinates of polygons), as Detectron2 expects.
    """
    keypoints: list[float] = []
    for x, y in item.axis.coords if item.axis else []:
        if image.buffer(-0.5).contains(Point(x, y)):
            visibility = 1 if item.nearer.contains(Point(x, y)) else 2
            keypoints += [round(x - 0.5, 2), round(y - 0.5, 2), visibility]
        else:
            keypoints += [0, 0, 0]
    return keypoints or [0, 0, 0] * len(KEYPOINT_NAMES)


def annotate(item: SceneObject, size: Size) -> dict[str, Any]:
    """One COCO annotation, but for its ids, of what is visible of an object in the picture."""
    image = picture_frame(size)
    visible = hole_free_polygons(item.visible(image))
    left, top, right, bottom = MultiPolygon(visible).bounds
    keypoints = _keypoints(item, image)
    return {
        "category_id": 1 + list(SHAPES).index(item.class_name),
        "iscrowd": int(item.axis is None),
        "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
        "area": round(sum(polygon.area for polygon in visible), 2),
        "segmentation": _segmentation(item, visible, size),
        "keypoints": keypoints,
        "num_keypoints": sum(visibility > 0 for visibility in keypoints[2::3]),
    }


def _make_split(folder: Path, seed: int, num_images: int) -> dict[str, Any]:
    """Draw the pictures of one split into `folder`; return their COCO annotations."""
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        rng = np.random.default_rng([seed, image_id])
        height, width = size = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
        scene = sample_scene(rng, size)
        file_name = f"{image_id:06d}.png"
        draw_scene(rng, scene, size).save(folder / file_name)
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for item in scene:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append(ids | annotate(item, size))
    categories = [
        {"id": i, "name": name, "keypoints": KEYPOINT_NAMES, "skeleton": [[1, 2]]}
        for i, name in enumerate(SHAPES, start=1)
    ]
    return {
        "info": {"description": "nl_detectron shapes", "version": "1"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def make_shapes(root: str | Path, num_train: int = 600, num_val: int = 100) -> Path:
    """Draw the shapes datasets: ``{train,val}.json`` in COCO's format and ``{train,val}/*.png``.

    Everything is made in a folder beside `root` which takes its name when complete: `root` is
    never half-made, and processes may start at once. A complete `root` is left as it is.

    Args:
        root: the folder to make; its parents are made too.
        num_train: number of training images.
        num_val: number of validation images.

    Returns:
        `root`.

    Raises:
        FileExistsError: `root` exists and holds something else.
    """
    root = Path(root)
    complete = root / "val.json"
    if complete.exists():
        return root
    if root.exists():
        raise FileExistsError(
            f"{root} exists but holds no shapes; delete it or name another folder"
        )
    logger.info(f"Drawing {num_train} + {num_val} images of shapes into {root} ...")
    draft = root.with_name(f"{root.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        for seed, (split, num_images) in enumerate([("train", num_train), ("val", num_val)]):
            coco = _make_split(draft / split, seed, num_images)
            (draft / f"{split}.json").write_text(json.dumps(coco))
        draft.rename(root)
    except OSError:
        if not complete.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def register_shapes(root: str | Path) -> None:
    """Register ``shapes_train`` and ``shapes_val``, to be made in the folder `root` on first use.

    Registering again replaces what was registered.
    """
    for split in ("train", "val"):
        _register_split(f"shapes_{split}", Path(root), split)


def _register_split(name: str, root: Path, split: str) -> None:
    json_file, image_root = str(root / f"{split}.json"), str(root / split)

    def load() -> list[dict[str, Any]]:
        make_shapes(root)
        return load_coco_json(json_file, image_root, name)

    DatasetCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(
        thing_classes=list(SHAPES),
        thing_colors=CLASS_COLORS,
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(SHAPES))},
        keypoint_names=KEYPOINT_NAMES,
        keypoint_flip_map=[],  # neither is the other's mirror image
        keypoint_connection_rules=[("head", "tail", (255, 255, 255))],
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
    )


def default_root() -> Path:
    """The folder of the registered datasets, in Detectron2's cache (``$FVCORE_CACHE``)."""
    return Path(get_cache_dir()) / "nl_detectron" / "shapes-v1"
