"""What all built-in sets of squares have in common: long_range* and long_range_match*."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

import nl_detectron.data.toy
from nl_detectron.data.toy import (
    make_long_range,
    make_long_range_match,
    register_long_range,
    register_long_range_match,
)
from nl_detectron.data.toy.long_range import CUES
from nl_detectron.data.toy.long_range_match import PARTNERS


class Family(NamedTuple):
    name: str
    make: Callable
    register: Callable
    argument: str
    kinds: tuple
    classes: list


FAMILIES = {
    "long_range": Family(
        "long_range", make_long_range, register_long_range, "cue", CUES, ["red", "blue"]
    ),
    "long_range_match": Family(
        "long_range_match",
        make_long_range_match,
        register_long_range_match,
        "partner",
        PARTNERS,
        ["bright", "dark"],
    ),
}
COUNTS = {"train": 3, "val": 60}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def root(family, tmp_path_factory):
    root = tmp_path_factory.mktemp(family.name)
    for kind in family.kinds:
        family.make(root / kind, kind, num_train=COUNTS["train"], num_val=COUNTS["val"])
    return root


@pytest.fixture
def registered(family, root):
    family.register(root)
    yield
    importlib.reload(nl_detectron.data.toy)


def test_registered_with_metadata(registered, family):
    for kind in family.kinds:
        for split, count in COUNTS.items():
            name = f"{family.name}{'' if kind == 'far' else f'_{kind}'}_{split}"
            records = DatasetCatalog.get(name)
            assert len(records) == count
            assert all(f"/{kind}/{split}/" in record["file_name"] for record in records)
            assert MetadataCatalog.get(name).thing_classes == family.classes
            assert MetadataCatalog.get(name).keypoint_names == ["side"]


def test_registered_in_detectron2s_cache(family, tmp_path):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FVCORE_CACHE", str(tmp_path))
        importlib.reload(nl_detectron.data.toy)
        assert list(tmp_path.rglob("*.png")) == []  # importing makes nothing
        root = tmp_path / "nl_detectron" / f"{family.name}-v1"
        family.make(root / "near", "near", num_train=2, num_val=3)
        assert len(DatasetCatalog.get(f"{family.name}_near_val")) == 3
    importlib.reload(nl_detectron.data.toy)


def test_ground_truth_scores_one(registered, family, evaluate_ground_truth):
    results = evaluate_ground_truth(f"{family.name}_val", kpt_oks_sigmas=[0.1])
    assert {task: results[task]["AP"] for task in results} == pytest.approx(
        {"bbox": 100, "segm": 100, "keypoints": 100}
    )


def test_unknown_kind_is_named(family, tmp_path):
    message = rf"{family.argument} is 'fra', but must be .*did you mean 'far'"
    with pytest.raises(ValueError, match=message):
        family.make(tmp_path / "x", "fra")
