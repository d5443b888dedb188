"""Detectron2's default trainer, evaluating on COCO and loading with a report."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.engine.hooks import EvalHook, PreciseBN
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.evaluation import verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.optim import Optimizer

from nl_detectron.config import keys_for_arguments, nonlocal_node
from nl_detectron.data import (
    CompletingCOCOEvaluator,
    FastCOCOEvaluator,
    TrainLoader,
    build_train_loader,
)
from nl_detectron.engine.checkpoint import NonLocalCheckpointer
from nl_detectron.engine.exact_resume import ExactResume
from nl_detectron.engine.hooks import BestCheckpointHook, BlockWeightsHook, hooks_of_run
from nl_detectron.engine.interruption import Interruption
from nl_detectron.engine.optimizer import scale_block_lr
from nl_detectron.engine.run_config import values_to_keep
from nl_detectron.engine.setup import config_keys_in_errors

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates what a config describes; see Detectron2's ``DefaultTrainer``. A resumed
    run goes on exactly (see :class:`ExactResume`), and signals end it with a checkpoint (see
    :class:`Interruption`)."""

    checkpointer: NonLocalCheckpointer

    def __init__(self, cfg: CfgNode) -> None:
        self._kept_values = values_to_keep(cfg)  # before they are scaled to the processes
        self._results: dict[str, Any] | None = None
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase]:
        """Those of :func:`hooks_of_run`, as the config has them."""
        cfg, node = self.cfg, nonlocal_node(self.cfg)
        # In the place of that which the parent's __init__ cannot do without.
        self.checkpointer = NonLocalCheckpointer(
            self.checkpointer.model,
            cfg.OUTPUT_DIR,
            keep_last=cfg.SOLVER.get("CHECKPOINT_KEEP_LAST", 0),
            trainer=weakref.proxy(self),
        )
        self._interruption = Interruption(self.checkpointer)
        exact_resume = ExactResume(self.checkpointer, cfg.SEED, config=self._kept_values)
        return hooks_of_run(
            self._interruption,
            exact_resume,
            BlockWeightsHook(
                self.checkpointer.model,
                warmup_iters=cfg.SOLVER.WARMUP_ITERS,
                gamma_lr_factor=node.GAMMA_LR_FACTOR,
                lr_factor=node.LR_FACTOR,
            ),
            evaluate=self._evaluate,
            writers=self.build_writers() if comm.is_main_process() else [],
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
            checkpointing={"period": cfg.SOLVER.CHECKPOINT_PERIOD},
            eval_period=cfg.TEST.EVAL_PERIOD,
            precise_bn=self._build_precise_bn(exact_resume),
            after_evaluation=self._build_after_evaluation(),
        )

    def _build_precise_bn(self, exact_resume: ExactResume) -> PreciseBN | None:
        """With the period of the evaluation, and a loader of its own, without processes."""
        cfg = self.cfg.clone()
        if not cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        period, num_iter = cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER
        loader = exact_resume.batches_of_precise_bn(self.build_train_loader(cfg), period, num_iter)
        return PreciseBN(period, self.model, loader, num_iter)

    def _build_after_evaluation(self) -> list[HookBase]:
        cfg, hooks = self.cfg, []
        if metric := cfg.TEST.get("BEST_CHECKPOINT_METRIC", ""):
            model = self.checkpointer.model
            hooks.append(BestCheckpointHook(cfg.TEST.EVAL_PERIOD, model, cfg.OUTPUT_DIR, metric))
        if cfg.TEST.AUG.ENABLED:
            hooks.append(EvalHook(0, lambda: self.test_with_TTA(cfg, self.model)))
        return hooks

    def _evaluate(self) -> dict[str, Any]:
        self._results = self.test(self.cfg, self.model)
        return self._results

    def resume_or_load(self, resume: bool = True) -> None:
        """With ``resume``, go on from the last sound checkpoint in ``cfg.OUTPUT_DIR``; without one,
        or without ``resume``, load ``cfg.MODEL.WEIGHTS`` and start at 0."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        # A checkpoint holds the iteration that was just finished.
        self.start_iter = self.iter + 1 if self.checkpointer.resumed else 0

    def train(self) -> dict[str, Any] | None:
        """Train, as ``DefaultTrainer.train`` does, until the end or a signal; return the results of
        the last evaluation, if ``cfg.TEST.EXPECTED_RESULTS`` are met."""
        with self._interruption.watch():
            TrainerBase.train(self, self.start_iter, self.max_iter)
        if not (self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process()):
            return None
        verify_results(self.cfg, self._results)
        return self._results

    def state_dict(self) -> dict[str, Any]:
        # Detectron2 0.6 forgets the optimizer's momentum; its main branch saves it as this does.
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a trainer's state; without its optimizer's, start that afresh, with a warning."""
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint has no optimizer state, as Detectron2 0.6 forgets it.")
            state_dict = {**state_dict, "_trainer": self._trainer.state_dict()}
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """
        Build the model that a config describes, on its device.

        Raises:
            ValueError: a value in the config is not legal; the message names the key.
        """
        with config_keys_in_errors(cfg):
            return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """
        Build Detectron2's optimizer, with the learning rates of ``MODEL.NONLOCAL`` for the blocks.

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
        """Detectron2's images, mapper and batch size, in an order that a resumed run keeps."""
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> CompletingCOCOEvaluator:
        """Build what computes COCO's box, mask and keypoint AP, for what the model predicts; the
        predictions go to ``output_folder``, by default ``inference`` in ``cfg.OUTPUT_DIR``."""
        evaluator = FastCOCOEvaluator if cfg.TEST.get("FAST_EVAL") else CompletingCOCOEvaluator
        return evaluator(
            dataset_name,
            output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"),
            # The official implementation; Detectron2's faster one says of itself that it is not.
            use_fast_impl=False,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate a ``GeneralizedRCNN`` without keypoints with test-time augmentation: what
        ``test`` returns, each name with "_TTA" behind it. Predictions are in ``inference_TTA`` in
        ``cfg.OUTPUT_DIR``."""
        logger.info("Evaluating with test-time augmentation ...")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}
