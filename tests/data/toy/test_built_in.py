"""What all built-in sets have in common: how they are made, kept and registered."""

import importlib
import json
import multiprocessing
import os
import time

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from nl_detectron.data import toy
from nl_detectron.data.toy import make_shapes
from tests.data.toy.conftest import FAMILIES


def test_registered_with_metadata(registered, name):
    family = FAMILIES[name]
    for kind in family.kinds:
        for split, count in family.counts.items():
            full_name = f"{name}{'' if kind in ('', 'far') else f'_{kind}'}_{split}"
            metadata = MetadataCatalog.get(full_name)
            assert metadata.thing_classes == family.classes
            assert metadata.keypoint_names == family.keypoints
            ids = metadata.thing_dataset_id_to_contiguous_id
            assert ids == {i + 1: i for i in range(len(family.classes))}
            records = DatasetCatalog.get(full_name)  # which sets the same metadata, or raises
            assert len(records) == count
            assert os.path.isfile(metadata.json_file)
            assert metadata.image_root.endswith(os.path.join(name, kind, split))
            assert all(r["file_name"].startswith(metadata.image_root) for r in records)


def test_registered_in_detectron2s_cache(name, tmp_path):
    family = FAMILIES[name]
    kind = "near" if "near" in family.kinds else ""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FVCORE_CACHE", str(tmp_path))
        importlib.reload(toy)  # registering twice does no harm
        assert list(tmp_path.rglob("*.png")) == []  # importing makes nothing
        family.draw(tmp_path / "nl_detectron" / f"{name}-v1", kind, 2, 3)
        for split, count in (("train", 2), ("val", 3)):
            full_name = "_".join(filter(None, (name, kind, split)))
            assert len(DatasetCatalog.get(full_name)) == count
    importlib.reload(toy)


def test_ground_truth_scores_one(registered, name, evaluate_ground_truth):
    sigmas = [0.05] * len(FAMILIES[name].keypoints)
    results = evaluate_ground_truth(f"{name}_val", kpt_oks_sigmas=sigmas)
    assert {task: results[task]["AP"] for task in results} == pytest.approx(
        {"bbox": 100, "segm": 100, "keypoints": 100}
    )


def pixels(root):
    return {path.relative_to(root): np.asarray(Image.open(path)) for path in root.glob("*/*.png")}


def test_pictures_differ_and_are_the_same_again(roots, name, tmp_path):
    family = FAMILIES[name]
    kind = family.kinds[0]
    first = pixels(roots / name / kind)
    assert len({picture.tobytes() for picture in first.values()}) == sum(family.counts.values())
    again = family.draw(tmp_path / "again", kind, family.counts["train"], 10)
    train = (again / "train.json").read_bytes()
    assert train == (roots / name / kind / "train.json").read_bytes()
    second = pixels(again)
    assert len(second) == family.counts["train"] + 10
    assert all(np.array_equal(first[file], picture) for file, picture in second.items())


@pytest.mark.parametrize(
    ("name", "argument"), [("long_range", "cue"), ("long_range_match", "partner")]
)
def test_unknown_kind_is_named(name, argument, tmp_path):
    message = rf"{argument} is 'fra', but must be .*did you mean 'far'"
    with pytest.raises(ValueError, match=message):
        FAMILIES[name].make(tmp_path / "x", "fra")


def _make_small(barrier, root):
    barrier.wait()
    make_shapes(root, num_train=20, num_val=20)


def test_processes_may_start_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(4)
    root = tmp_path / "cache" / "shapes"
    makers = [fork.Process(target=_make_small, args=(barrier, root)) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0] * 4
    assert [path.name for path in root.parent.iterdir()] == ["shapes"]  # and no drafts
    for split in ("train", "val"):
        listed = {
            i["file_name"] for i in json.loads((root / f"{split}.json").read_text())["images"]
        }
        assert listed == set(os.listdir(root / split))
        assert len(listed) == 20


def test_killed_make_leaves_no_half_made_set(tmp_path):
    root = tmp_path / "shapes"
    maker = multiprocessing.get_context("fork").Process(target=make_shapes, args=(root,))
    maker.start()
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("*/train/*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    maker.kill()
    maker.join(60)
    assert not root.exists()
    assert len(pixels(make_shapes(root, num_train=2, num_val=3))) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]  # and no drafts


def test_failed_make_cleans_up(tmp_path, monkeypatch):
    def disk_full(self, path):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        make_shapes(tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []


def test_complete_set_is_kept_and_other_folders_are_refused(roots, tmp_path):
    root = roots / "shapes"
    before = (root / "val.json").stat().st_mtime_ns
    assert make_shapes(root) == root
    assert (root / "val.json").stat().st_mtime_ns == before
    (tmp_path / "precious.txt").touch()
    with pytest.raises(FileExistsError, match="holds no shapes"):
        make_shapes(tmp_path)
