"""Small built-in sets, each drawn once."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from nl_detectron.data import toy
from nl_detectron.data.toy.long_range import CUES
from nl_detectron.data.toy.long_range_match import PARTNERS


class Family(NamedTuple):
    """Sets that are made and registered together."""

    make: Callable  # of a folder, the kind if there are several, and the numbers of pictures
    register: Callable
    kinds: tuple  # "" for the only one
    classes: list
    keypoints: list
    counts: dict

    def draw(self, folder, kind, num_train, num_val):
        return self.make(folder / kind, *filter(None, [kind]), num_train, num_val)


FAMILIES = {
    "shapes": Family(
        toy.make_shapes,
        toy.register_shapes,
        ("",),
        ["ring", "triangle", "square"],
        ["head", "tail"],
        {"train": 8, "val": 100},
    ),
    "long_range": Family(
        toy.make_long_range,
        toy.register_long_range,
        CUES,
        ["red", "blue"],
        ["side"],
        {"train": 3, "val": 60},
    ),
    "long_range_match": Family(
        toy.make_long_range_match,
        toy.register_long_range_match,
        PARTNERS,
        ["bright", "dark"],
        ["side"],
        {"train": 60, "val": 60},
    ),
}


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """A folder with one for each family, which has one for each kind."""
    folder = tmp_path_factory.mktemp("toy")
    for name, family in FAMILIES.items():
        for kind in family.kinds:
            family.draw(folder / name, kind, *family.counts.values())
    return folder


@pytest.fixture(scope="session")
def examples(roots):
    """Of each picture its pixels, its annotations, and their masks."""

    @cache
    def examples(name, kind="", split="val"):
        coco = COCO(roots / name / kind / f"{split}.json")
        found = []
        for image_id, image in coco.imgs.items():
            file = roots / name / kind / split / image["file_name"]
            annotations = coco.imgToAnns[image_id]
            masks = [coco.annToMask(a).astype(bool) for a in annotations]
            found.append((np.asarray(Image.open(file)).astype(int), annotations, masks))
        return found

    return examples


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def registered(name, roots):
    FAMILIES[name].register(str(roots / name))
    yield
    importlib.reload(toy)
