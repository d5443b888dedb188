"""COCO's APs by faster-coco-eval: the same numbers in a fraction of the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.evaluation import coco_evaluation

from nl_detectron.data.coco_records import CompletingCOCOEvaluator


class FastCOCOEvaluator(CompletingCOCOEvaluator):
    """
    Evaluates as its parent does, with faster-coco-eval in the place of pycocotools, where
    ``max_dets_per_image`` is COCO's 100.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        with _faster_coco_eval():
            super().__init__(*args, **options)

    def evaluate(self, img_ids: Any = None) -> dict[str, Any]:
        """What ``COCOEvaluator.evaluate`` returns."""
        with _faster_coco_eval():
            return super().evaluate(img_ids)


@contextmanager
def _faster_coco_eval() -> Iterator[None]:
    """Detectron2 has no other place for an implementation of one's choice than these two names."""
    from faster_coco_eval import COCO, COCOeval_faster

    official = coco_evaluation.COCO, coco_evaluation.COCOeval
    coco_evaluation.COCO, coco_evaluation.COCOeval = COCO, COCOeval_faster
    try:
        yield
    finally:
        coco_evaluation.COCO, coco_evaluation.COCOeval = official
