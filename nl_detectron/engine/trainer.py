"""Detectron2's default trainer, evaluating on COCO and loading with a report."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.engine.hooks import EvalHook
from detectron2.engine.train_loop import HookBase
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn
from torch.optim import Optimizer

from nl_detectron.config import keys_for_arguments, nonlocal_node
from nl_detectron.data import CompletingCOCOEvaluator, TrainLoader, build_train_loader
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.exact_resume import ExactResume
from nl_detectron.engine.hooks import (
    BestCheckpointHook,
    BlockWeightsHook,
    NoEvaluationAfterFailureHook,
    SamplingByImageHook,
)
from nl_detectron.engine.interruption import Interruption
from nl_detectron.engine.optimizer import scale_block_lr
from nl_detectron.engine.setup import config_keys_in_errors

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """
    Trains and evaluates what a config describes; see Detectron2's ``DefaultTrainer``. A resumed
    run goes on exactly (see :class:`ExactResume`), and signals end it with a checkpoint (see
    :class:`Interruption`).
    """

    checkpointer: NonLocalCheckpointer

    def build_hooks(self) -> list[HookBase | None]:
        # The parent has just made its own checkpointer; the hooks take this one.
        self.checkpointer = NonLocalCheckpointer(
            self.checkpointer.model,
            self.cfg.OUTPUT_DIR,
            keep_last=self.cfg.SOLVER.get("CHECKPOINT_KEEP_LAST", 0),
            trainer=weakref.proxy(self),
        )
        self._interruption = Interruption(self.checkpointer)
        hooks = super().build_hooks()
        # After the periodic checkpoint; before the evaluation, which may take longer than there is.
        place = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        exact_resume = ExactResume(self.checkpointer, self.cfg.SEED)
        sampling = SamplingByImageHook(
            self.checkpointer.model,
            seed=lambda: exact_resume.seed,
            images_per_rank=self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        )
        hooks[place + 1 : place + 1] = self._hooks_after_evaluation()
        hooks[place:place] = [self._interruption, exact_resume, sampling]
        # First, so that they come before the writers, and the time that is written includes them.
        return [BlockWeightsHook(self.checkpointer.model), NoEvaluationAfterFailureHook(), *hooks]

    def _hooks_after_evaluation(self) -> list[HookBase]:
        """Before the writers, which then write what these put into the storage, too."""
        cfg, hooks = self.cfg, []
        if metric := cfg.TEST.get("BEST_CHECKPOINT_METRIC", ""):
            model = self.checkpointer.model
            hooks.append(BestCheckpointHook(cfg.TEST.EVAL_PERIOD, model, cfg.OUTPUT_DIR, metric))
        if cfg.TEST.AUG.ENABLED:
            hooks.append(EvalHook(0, lambda: self.test_with_TTA(cfg, self.model)))
        return hooks

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Args:
            resume: go on from the last sound checkpoint in ``cfg.OUTPUT_DIR``. Without one, or
                without ``resume``, ``cfg.MODEL.WEIGHTS`` is loaded and training starts at 0.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        # A checkpoint holds the iteration that was just finished.
        self.start_iter = self.iter + 1 if self.checkpointer.resumed else 0

    def train(self) -> Any:
        """Train, as ``DefaultTrainer.train`` does, until the end or a signal."""
        with self._interruption.watch():
            return super().train()

    def state_dict(self) -> dict[str, Any]:
        # Detectron2 0.6 forgets the optimizer's momentum; its main branch saves it as this does.
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Args:
            state_dict: what :meth:`state_dict`, or Detectron2's, returned. Without the optimizer's
                state the optimizer starts afresh, with a warning.
        """
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint has no optimizer state, as Detectron2 0.6 forgets it.")
            state_dict = {**state_dict, "_trainer": self._trainer.state_dict()}
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """
        Args:
            cfg: the config.

        Returns:
            Its model, on its device.

        Raises:
            ValueError: a value in the config is not legal; the message names the key.
        """
        with config_keys_in_errors(cfg):
            return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """
        Args:
            cfg: the config.
            model: what is trained.

        Returns:
            Detectron2's optimizer, with the learning rates of ``MODEL.NONLOCAL`` for the blocks.

        Raises:
            ValueError: a factor for these is not legal; the message names the key.
        """
        optimizer = super().build_optimizer(cfg, model)
        node = nonlocal_node(cfg)
        with keys_for_arguments(node):
            optimizer.param_groups = scale_block_lr(
                optimizer.param_groups, model, node.GAMMA_LR_FACTOR, node.LR_FACTOR
            )
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """
        Args:
            cfg: the config.

        Returns:
            Detectron2's images, mapper and batch size, in an order that a resumed run keeps.
        """
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> CompletingCOCOEvaluator:
        """
        Args:
            cfg: the config.
            dataset_name: a registered dataset in COCO's format.
            output_folder: gets the predictions, in COCO's format; by default ``inference`` in
                ``cfg.OUTPUT_DIR``.

        Returns:
            What computes COCO's box, mask and keypoint AP, for what the model predicts.
        """
        return CompletingCOCOEvaluator(
            dataset_name,
            output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"),
            # The official implementation; Detectron2's faster one says of itself that it is not.
            use_fast_impl=False,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """
        Evaluate with test-time augmentation, ``cfg.TEST.AUG``, as Detectron2's projects do.

        Args:
            cfg: the config, without keypoints, which Detectron2 does not augment.
            model: a ``GeneralizedRCNN``.

        Returns:
            What ``test`` returns, each name with "_TTA" behind it. Predictions are in
            ``inference_TTA`` in ``cfg.OUTPUT_DIR``.
        """
        logger.info("Evaluating with test-time augmentation ...")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}
