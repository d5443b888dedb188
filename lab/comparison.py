"""Two models' saved predictions for the same pictures: their APs, how sure the difference is, and
the kinds of errors that they make."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.data.coco_format import Record

FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
"""COCO's tasks, and the field of a prediction that each is about."""

KINDS = {
    "Cls": "another class",
    "Loc": "poorly placed",
    "Both": "another class and poorly placed",
    "Dupe": "found twice",
    "Bkg": "background",
    "Miss": "missed",
}
"""TIDE's kinds of errors in words; in the order in which they are shown."""

# Without what it depends on: tidecv's OpenCV would come in the place of the one that is there.
_TIDE = ("tidecv", "appdirs", "pandas", "seaborn")


class Difference(NamedTuple):
    """An AP of two models, in percent, and the 95 % interval of the second less the first."""

    a: float
    b: float
    low: float
    high: float
    pictures: int
    """How many have objects that this AP is about. Of a few, an interval says little."""


class Errors(NamedTuple):
    """What a model would gain if it made no error of a kind; and what it took for what."""

    kinds: dict[str, float]
    """By the keys of ``KINDS``: points of AP50 to gain if all errors of the kind were corrected."""
    confusions: Counter[tuple[str, str]]
    """How many objects of a class have their highest score as another: (class, other class)."""


class _Matches(NamedTuple):
    """What COCO matched for a class and a range of sizes: N predictions at T overlaps."""

    scores: np.ndarray  # (N,), descending
    picture: np.ndarray  # (N,), from 0
    right: np.ndarray  # (T, N), bool
    wrong: np.ndarray  # (T, N), bool; those that do not count are neither
    objects: np.ndarray  # (pictures,): how many objects there are to find


def match_predictions(
    truth: COCO, predictions: Sequence[Record], task: str, oks_sigmas: Sequence[float] = ()
) -> COCOeval:
    """Match predictions with the objects of a dataset, as Detectron2's evaluator does; not
    accumulated. ValueError: some are for pictures that are not in the dataset."""
    if unknown := {p["image_id"] for p in predictions} - set(truth.getImgIds()):
        raise ValueError(f"there are predictions for image {min(unknown)}, which the dataset lacks")
    # COCO's API takes the size of a mask from the box, if there is one.
    dropped = "bbox" if task == "segm" else None
    copies = [{k: v for k, v in p.items() if k != dropped} for p in predictions]
    with contextlib.redirect_stdout(io.StringIO()):
        if copies:
            found = truth.loadRes(copies)
        else:  # which loadRes does not take
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, task)
        if oks_sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(oks_sigmas)
        evaluation.evaluate()
    return evaluation


class AveragePrecisions:
    """The APs of predictions, for any sample of the pictures that they were made for."""

    def __init__(self, evaluation: COCOeval) -> None:
        params = evaluation.params
        classes = evaluation.cocoGt.loadCats(params.catIds)
        self.classes = [category["name"] for category in classes]
        self.image_ids: list[int] = list(params.imgIds)
        self._recalls = params.recThrs
        # evalImgs is by class, size and picture, in this order.
        rows = np.arange(len(evaluation.evalImgs)).reshape(len(classes), len(params.areaRng), -1)
        self._matches = {
            size: [_collect([evaluation.evalImgs[i] for i in rows[k, a]]) for k in range(len(rows))]
            for a, size in enumerate(params.areaRngLbl)
        }

    def __call__(self, counts: np.ndarray | None = None) -> dict[str, float]:
        """
        "AP", "AP50", "AP75", "APs", "APm", "APl" and for each class "AP-name", in percent, as
        Detectron2 writes them; NaN where there are no objects. Keypoints have no "APs". ``counts``
        (pictures,) tells how often each picture is in the sample, in the order of ``image_ids``.
        """
        if counts is None:
            counts = np.ones(len(self.image_ids), dtype=int)
        by_size = {
            size: np.stack([self._sampled(m, counts) for m in matches], axis=2)
            for size, matches in self._matches.items()
        }
        every = by_size.pop("all")  # (overlaps, recalls, classes); overlaps: 0.50, 0.55, ... 0.95
        parts = {"AP": every, "AP50": every[:1], "AP75": every[5:6]}
        parts |= {f"AP{size[0]}": precisions for size, precisions in by_size.items()}
        parts |= {f"AP-{name}": every[:, :, k] for k, name in enumerate(self.classes)}
        return {name: _mean(precisions) for name, precisions in parts.items()}

    def num_pictures(self) -> list[int]:
        """How many pictures have objects that each of the APs is about, in their order."""
        has = {
            size: np.stack([m.objects > 0 for m in matches])
            for size, matches in self._matches.items()
        }
        every = has.pop("all")  # (classes, pictures)
        groups = [every, every, every, *has.values(), *every[:, None]]
        return [int(group.any(axis=0).sum()) for group in groups]

    def of_pictures(self) -> np.ndarray:
        """
        (pictures,), in percent: the AP of each picture alone, with all classes in one ranking, so
        that a wrong class that scores higher counts; NaN for pictures without objects.
        """
        of_classes = self._matches["all"]
        scores, picture, right, wrong = (
            np.concatenate(parts, axis=-1) for parts in list(zip(*of_classes))[:4]
        )
        order = np.argsort(-scores, kind="stable")
        picture, right, wrong = picture[order], right[:, order], wrong[:, order]
        objects = np.sum([m.objects for m in of_classes], axis=0)
        aps = [
            _mean(self._precisions(right[:, picture == i], wrong[:, picture == i], number))
            for i, number in enumerate(objects)
        ]
        return np.array(aps)

    def _sampled(self, matches: _Matches, counts: np.ndarray) -> np.ndarray:
        of_predictions = counts[matches.picture]
        right, wrong = matches.right * of_predictions, matches.wrong * of_predictions
        return self._precisions(right, wrong, int(counts @ matches.objects))

    def _precisions(self, right: np.ndarray, wrong: np.ndarray, objects: int) -> np.ndarray:
        """(overlaps, recalls), as COCOeval.accumulate computes them; -1 without objects."""
        result = np.zeros((len(right), len(self._recalls)))
        if not objects:
            return result - 1
        found, false = np.cumsum(right, axis=1), np.cumsum(wrong, axis=1)
        precision = found / (false + found + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for row, recall, of_row in zip(result, found / objects, precision):
            places = np.searchsorted(recall, self._recalls)
            reached = places < len(recall)
            row[reached] = of_row[places[reached]]
        return result


def _collect(pictures: Sequence[Record | None]) -> _Matches:
    """What COCO found in each picture, for a class and a range of sizes, in one piece."""
    present = [(i, p) for i, p in enumerate(pictures) if p is not None]
    objects = np.zeros(len(pictures), dtype=int)
    if not present:
        none = np.zeros((10, 0), dtype=bool)
        return _Matches(np.zeros(0), np.zeros(0, dtype=int), none, none, objects)
    for i, p in present:
        objects[i] = np.count_nonzero(p["gtIgnore"] == 0)
    picture = np.concatenate([np.full(len(p["dtScores"]), i, dtype=int) for i, p in present])
    scores, matched, ignored = (
        np.concatenate([p[key] for _, p in present], axis=-1)
        for key in ("dtScores", "dtMatches", "dtIgnore")
    )
    order = np.argsort(-scores, kind="stable")  # as COCOeval's
    matched, counted = matched[:, order] > 0, ~ignored[:, order].astype(bool)
    return _Matches(scores[order], picture[order], matched & counted, ~matched & counted, objects)


def _mean(precisions: np.ndarray) -> float:
    present = precisions[precisions > -1]
    return 100 * float(np.mean(present)) if present.size else float("nan")


def compare_aps(
    a: AveragePrecisions, b: AveragePrecisions, resamples: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """
    The APs of two models for the same pictures and, by a paired bootstrap over the pictures
    (percentiles), the 95 % interval of their differences. It is about other pictures of the same
    kind; what another seed of training would change is not in it.
    """
    random = np.random.default_rng(seed)
    whole_a, whole_b, number = a(), b(), len(a.image_ids)
    differences = np.empty((resamples, len(whole_a)))
    for row in differences:
        counts = np.bincount(random.integers(number, size=number), minlength=number)
        row[:] = np.subtract(list(b(counts).values()), list(a(counts).values()))
    result = {}
    for i, (name, pictures) in enumerate(zip(whole_a, a.num_pictures())):
        values = differences[:, i][~np.isnan(differences[:, i])]
        low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (np.nan, np.nan)
        interval = float(low), float(high)
        result[name] = Difference(whole_a[name], whole_b[name], *interval, pictures)
    return result


def kinds_of_errors(truth: COCO, predictions: Sequence[Record], task: str) -> Errors:
    """What each of TIDE's kinds of errors (Bolya et al., ECCV 2020) costs at an overlap of 0.5, and
    which classes are confused, for "bbox" or "segm". ValueError: tidecv is not installed."""
    try:
        import tidecv
        from tidecv.data import Data
    except ImportError as error:
        raise ValueError(
            f"kinds of errors need the package {error.name}, which is not installed: "
            f"pip install --no-deps {' '.join(_TIDE)}, or leave them out with --no-errors"
        ) from error
    objects, found = Data("truth"), Data("predictions")
    for image_id in truth.getImgIds():
        objects.add_image(image_id, str(image_id))  # or those without objects would not count
    for annotation in truth.dataset["annotations"]:
        add = objects.add_ignore_region if annotation["iscrowd"] else objects.add_ground_truth
        mask = truth.annToRLE(annotation) if task == "segm" else None
        add(annotation["image_id"], annotation["category_id"], annotation["bbox"], mask)
    for p in predictions:
        mask = p["segmentation"] if task == "segm" else None
        found.add_detection(p["image_id"], p["category_id"], p["score"], p.get("bbox"), mask)
    run = tidecv.TIDE(mode=tidecv.TIDE.MASK if task == "segm" else tidecv.TIDE.BOX).evaluate(
        objects, found
    )
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    gains = {kind.short_name: gain for kind, gain in run.fix_main_errors().items()}
    # The highest score, and the class that has it, of each object that is found.
    best = {p["matched_with"]: (p["score"], p["class"]) for p in found.annotations if p["used"]}
    for mistake in run.errors:
        if mistake.short_name == "Cls":
            wrong = mistake.pred["score"], mistake.pred["class"]
            best[mistake.gt["_id"]] = max(best.get(mistake.gt["_id"], wrong), wrong)
    pairs = ((objects.annotations[i]["class"], taken_for) for i, (_, taken_for) in best.items())
    confusions = Counter((names[x], names[y]) for x, y in pairs if x != y)
    return Errors({kind: gains[kind] for kind in KINDS}, confusions)
