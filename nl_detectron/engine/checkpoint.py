"""Loading weights, and saying plainly which tensors got them and which did not."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from nl_detectron.checkpoint_io import CheckpointError, load_checkpoint
from nl_detectron.engine.load_report import LoadReport

logger = logging.getLogger(__name__)


class NonLocalCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, with a report that separates what is meant to start fresh (the
    non-local blocks of a model that is given weights without them; the detector around a
    classifier's weights) from what is missing. Files are read as data, and run nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        strict: bool = False,
        report: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: the model to load into and to save.
            save_dir: the folder that checkpoints are saved in.
            strict: nothing but non-local blocks may start fresh, and nothing be left over.
            report: log a table of all tensors and of what became of them.
            **kwargs: those of ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.strict = strict
        self.report = report

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Load weights, and what else the checkpoint holds, as ``DetectionCheckpointer.load`` does.

        Raises:
            CheckpointError: the file is no checkpoint; it has non-local blocks that the model lacks
                or has in another form (the message says what to set); or with ``strict``, anything
                but non-local blocks starts fresh or is left over.
        """
        if self.strict and not path:
            raise CheckpointError("Strict loading, but MODEL.WEIGHTS is empty: all starts fresh")
        self._source = path
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = load_checkpoint(filename)
        if filename.endswith(".pkl") and not {"model", "__author__"} <= content.keys():
            # From the zoos of Caffe2 and Detectron, whose detectors are under "blobs".
            weights = _without(content.get("blobs", content), "_momentum")
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):  # from pycls
            if "model_state" not in content:
                raise CheckpointError(f"{self._source} has no 'model_state', as pycls's files have")
            weights = _without(content["model_state"], "num_batches_tracked")
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        if "model" not in content:
            content = {"model": content}
        url = getattr(self, "_parsed_url_during_load", None)  # Detectron2 0.6 has no queries
        if url is not None and url.query == "matching_heuristics=True":
            content["matching_heuristics"] = True
        return content

    def _convert_ndarray_to_tensor(self, state_dict: dict[str, Any]) -> None:
        # Called last with what is then loaded, under the model's names.
        if not isinstance(state_dict, dict):
            raise CheckpointError(f"{self._source} has no state dict: {type(state_dict).__name__}")
        for name, value in state_dict.items():
            if not isinstance(name, str) or not isinstance(value, (np.ndarray, Tensor)):
                raise CheckpointError(
                    f"{self._source} is not a checkpoint of Detectron2: {name!r} in it is a "
                    f"{type(value).__name__}, not a tensor. Those of other implementations have to "
                    "be converted: tools/convert_weights.py"
                )
        super()._convert_ndarray_to_tensor(state_dict)
        self._state_dict = state_dict

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Log what was loaded; see :meth:`load` for what it raises."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self._state_dict.items()}
        shapes.update({name: shape for name, shape, _ in incompatible.incorrect_shapes})
        del self._state_dict
        report = LoadReport.of(self.model, self._source, shapes, incompatible)
        if self.report:
            logger.info(f"Weights from {self._source}:\n{report.table(self.model)}")
        if problem := report.block_problem(self.model):
            raise CheckpointError(problem)
        problems = report.strict_problems() if self.strict else []
        if problems:
            raise CheckpointError(
                f"Strict loading: {self._source} and the model differ in more than non-local "
                "blocks that start fresh:" + "\n    ".join(["", *problems])
            )
        logger.info(report.summary)
        for warning in report.warnings:
            logger.warning(warning)
        if report.unused:
            unused = ", ".join(sorted(report.unused))
            logger.info(f"Not used by the model, though in {self._source}: {unused}")


def _without(weights: Any, suffix: str) -> Any:
    """A state dict less the tensors whose names end so; anything else as it is."""
    if not isinstance(weights, dict):
        return weights
    return {name: value for name, value in weights.items() if not str(name).endswith(suffix)}
