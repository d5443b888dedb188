"""Detectron2's default trainer, evaluating on COCO and loading with a report."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import COCOEvaluator

from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.hooks import BlockWeightsHook, NoEvaluationAfterFailureHook

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates what a config describes; see Detectron2's ``DefaultTrainer``."""

    checkpointer: DetectionCheckpointer

    def build_hooks(self) -> list[HookBase | None]:
        # The parent has just made its own checkpointer; the hooks take this one.
        self.checkpointer = NonLocalCheckpointer(
            self.checkpointer.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        # First, so that they come before the writers, and the time that is written includes them.
        return [
            BlockWeightsHook(self.checkpointer.model),
            NoEvaluationAfterFailureHook(),
            *super().build_hooks(),
        ]

    def state_dict(self) -> dict[str, Any]:
        # Detectron2 0.6 forgets the optimizer's momentum; its main branch saves it as this does.
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint has no optimizer state, as Detectron2 0.6 forgets it.")
            state_dict = {**state_dict, "_trainer": self._trainer.state_dict()}
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> COCOEvaluator:
        """
        COCO's box, mask and keypoint AP, for what the model predicts; the predictions are kept in
        COCO's format in ``output_folder`` (default: ``inference`` in ``cfg.OUTPUT_DIR``).
        """
        return COCOEvaluator(
            dataset_name,
            output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"),
            # The official implementation; Detectron2's faster one says of itself that it is not.
            use_fast_impl=False,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
