"""APs against pycocotools; kinds of errors in detections that were made up for each kind."""

import contextlib
import copy
import io
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

from lab.comparison import (
    KINDS,
    AveragePrecisions,
    compare_aps,
    kinds_of_errors,
    match_predictions,
)

SIZE = 200
SIGMAS = [0.05, 0.1]
STATS = {
    "bbox": ["AP", "AP50", "AP75", "APs", "APm", "APl"],
    "segm": ["AP", "AP50", "AP75", "APs", "APm", "APl"],
    "keypoints": ["AP", "AP50", "AP75", "APm", "APl"],
}


def thing(image_id, category_id, box, **more):
    """An object, or a prediction if it has a score, whose mask is its box."""
    x, y, width, height = (float(v) for v in box)
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[round(y) : round(y + height), round(x) : round(x + width)] = 1
    rle = mask_util.encode(mask)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x, y, width, height],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        "keypoints": [x, y, 2, x + width, y + height, 2],
        **more,
    }


def dataset(objects, images, categories=("red", "blue", "absent")):
    coco = COCO()
    for i, annotation in enumerate(objects, start=1):
        area = annotation["bbox"][2] * annotation["bbox"][3]
        annotation |= {"id": i, "area": area, "iscrowd": annotation.get("iscrowd", 0)}
        annotation |= {"num_keypoints": 2}
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in images],
        "annotations": objects,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def random_data(rng, images=range(1, 13), scores=9):
    """Objects of all sizes and crowds; predictions moved, of another class, repeated, invented."""
    objects, predictions = [], []
    for image in images[:-1]:  # nothing in the last
        for _ in range(rng.integers(0, 5)):
            width, height = rng.integers(8, 120, 2)
            box = [*(rng.integers(0, SIZE - np.array([width, height]))), width, height]
            kind = int(rng.integers(1, 3))
            objects.append(thing(image, kind, box, iscrowd=int(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 3)):
                moved = np.clip(np.array(box) + rng.normal(0, 4, 4), 2, SIZE)
                other = int(rng.integers(1, 4)) if rng.random() < 0.3 else kind
                # Of few values some are equal.
                score = int(rng.integers(scores)) / scores
                predictions.append(thing(image, other, moved, score=score))
    predictions.append(thing(images[-1], 1, [5, 5, 30, 30], score=0.4))
    return objects, predictions


def official(truth, predictions, task):
    evaluation = match_predictions(truth, predictions, task, SIGMAS if task == "keypoints" else ())
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def same(a, b):
    return a == b or (math.isnan(a) and b == -100)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", STATS)
def test_aps_are_those_of_pycocotools(task, seed):
    objects, predictions = random_data(np.random.default_rng(seed))
    evaluation = official(dataset(objects, range(1, 13)), predictions, task)
    aps = AveragePrecisions(evaluation)()
    for name, expected in zip(STATS[task], evaluation.stats):
        assert same(aps[name], 100 * expected), name
    for k, name in enumerate(("red", "blue", "absent")):
        precision = evaluation.eval["precision"][:, :, k, 0, -1]
        expected = precision[precision > -1].mean() if (precision > -1).any() else -1
        assert same(aps[f"AP-{name}"], 100 * expected), name
    assert 5 < aps["AP"] < 95


@pytest.mark.parametrize("task", STATS)
def test_aps_of_a_sample_are_those_of_its_pictures(task):
    """Pictures that are drawn twice are as two pictures; of those that are not, nothing is left."""
    rng = np.random.default_rng(0)
    objects, predictions = random_data(rng, scores=10**9)  # the order of equal ones is open
    counts = rng.integers(0, 4, 12)
    sigmas = SIGMAS if task == "keypoints" else ()
    whole = match_predictions(dataset(objects, range(1, 13)), predictions, task, sigmas)
    drawn = [(image, copy_) for image in range(1, 13) for copy_ in range(counts[image - 1])]

    def repeated(things):
        return [
            {**copy.deepcopy(t), "image_id": new_id}
            for new_id, (image, _) in enumerate(drawn, start=1)
            for t in things
            if t["image_id"] == image
        ]

    truth = dataset(repeated(objects), range(1, len(drawn) + 1))
    expected = AveragePrecisions(match_predictions(truth, repeated(predictions), task, sigmas))()
    assert AveragePrecisions(whole)(counts) == pytest.approx(expected, nan_ok=True, abs=1e-9)


def test_aps_of_pictures():
    box = [10, 10, 40, 40]
    objects = [thing(i, c, box) for i, c in ((1, 1), (2, 1), (2, 2), (3, 2), (4, 2))]
    found = ((1, 1, 0.9), (2, 1, 0.9), (3, 1, 0.9), (4, 1, 0.9), (4, 2, 0.8), (5, 1, 0.9))
    predictions = [thing(image, category, box, score=score) for image, category, score in found]
    aps = AveragePrecisions(match_predictions(dataset(objects, range(1, 6)), predictions, "bbox"))
    # All; one of two (COCO's AP is a mean over 101 recalls); another class, alone and in front.
    expected = [100, 100 * 51 / 101, 0, 50, np.nan]
    np.testing.assert_allclose(aps.of_pictures(), expected)


def test_interval_of_the_difference():
    objects = [thing(i, 1 + i % 2, [10, 10, 40, 40]) for i in range(1, 41)]
    found = [{**o, "score": 0.9} for o in objects]
    truth = dataset(objects, range(1, 41))

    def aps(predictions):
        return AveragePrecisions(match_predictions(truth, predictions, "bbox"))

    nothing, half, all_ = aps([]), aps(found[:20]), aps(found)
    hundred = pytest.approx(100)
    assert compare_aps(nothing, all_, 20)["AP"] == (0, hundred, hundred, hundred, 40)
    equal = compare_aps(half, half, 20)
    assert equal["AP50"][2:] == (0, 0, 40)
    assert equal["AP-absent"] == pytest.approx([*[math.nan] * 4, 0], nan_ok=True)
    differences = compare_aps(half, all_, 200)
    low, high = differences["AP-red"].low, differences["AP-red"].high
    assert 20 < low < differences["AP-red"].b - differences["AP-red"].a < high < 80
    assert compare_aps(half, all_, 200)["AP-red"] == differences["AP-red"]  # the same each time
    assert compare_aps(all_, half, 200)["AP-red"][2:] == pytest.approx((-high, -low, 20))


def test_predictions_for_other_pictures_are_refused():
    with pytest.raises(ValueError, match="predictions for image 7, which the dataset lacks"):
        match_predictions(dataset([], [1]), [thing(7, 1, [1, 1, 5, 5], score=1)], "bbox")


A, B, C = [10, 10, 40, 40], [110, 10, 40, 40], [10, 110, 40, 40]
MOVED = [32, 10, 40, 40]  # from A: an overlap of 0.29
FOUND = {"a": (1, A, 0.9), "c": (1, C, 0.5), "b": (2, B, 0.9)}  # red, red and blue
MADE_UP = {
    "Cls": {"a": (2, A, 0.95), "more": (2, C, 0.4)},  # of these two, C scores higher as red
    "Loc": {"a": (1, MOVED, 0.9)},
    "Both": {"more": (2, MOVED, 0.95)},
    "Dupe": {"more": (1, A, 0.8)},
    "Bkg": {"more": (1, [110, 110, 40, 40], 0.95)},
    "Miss": {"c": None},
}


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("kind", [None, *MADE_UP])
def test_kinds_of_errors(kind, task):
    pytest.importorskip("tidecv")
    truth = dataset([thing(1, 1, A), thing(1, 1, C), thing(1, 2, B)], [1, 2])
    chosen = [p for p in (FOUND | MADE_UP.get(kind, {})).values() if p]
    predictions = [thing(1, category, box, score=s) for category, box, s in chosen]
    errors = kinds_of_errors(truth, predictions, task)
    assert list(errors.kinds) == list(KINDS) == list(MADE_UP)
    assert {name for name, gain in errors.kinds.items() if gain > 1} == ({kind} - {None})
    assert errors.confusions == ({("red", "blue"): 1} if kind == "Cls" else {})


def test_errors_in_pictures_without_objects_and_in_crowds():
    pytest.importorskip("tidecv")
    crowd = thing(1, 1, [100, 100, 90, 90], iscrowd=1)
    truth = dataset([thing(1, 1, A), crowd], [1, 2])
    predictions = [thing(1, 1, A, score=0.5), thing(1, 1, [110, 110, 30, 30], score=0.9)]
    assert sum(kinds_of_errors(truth, predictions, "bbox").kinds.values()) == 0
    predictions.append(thing(2, 1, A, score=0.9))
    assert kinds_of_errors(truth, predictions, "bbox").kinds["Bkg"] > 1


def test_without_tidecv_the_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tidecv", None)
    with pytest.raises(ValueError, match=r"the package tidecv, .* pip install --no-deps tidecv"):
        kinds_of_errors(dataset([], [1]), [], "bbox")
