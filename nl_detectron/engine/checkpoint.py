"""Loading weights, and saying plainly which tensors got them and which did not."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import get_missing_parameters_message
from torch import nn

from nl_detectron.layers import NonLocalBlock

logger = logging.getLogger(__name__)


class NonLocalCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer with a report that separates what is meant to start fresh (the
    non-local blocks of a model that is given weights without them; the detector around a
    classifier's weights) from what is missing.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._source = path
        return super().load(path, *args, **kwargs)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """
        Log one line that says what was loaded and what starts fresh, and warn of anything else.

        Args:
            incompatible: fvcore's record with the lists ``missing_keys``, ``unexpected_keys`` and
                ``incorrect_shapes`` (key, shape in the checkpoint, shape in the model).
        """
        mismatched = {key for key, _, _ in incompatible.incorrect_shapes}
        not_loaded = set(incompatible.missing_keys) | mismatched
        # A checkpoint may lack batch norm's counters without their being reported as missing.
        tensors = {k for k in self.model.state_dict() if not k.endswith("num_batches_tracked")}
        loaded = tensors - not_loaded

        blocks = [name for name, m in self.model.named_modules() if isinstance(m, NonLocalBlock)]
        fresh_blocks = [name for name in blocks if not _below([name], loaded)]
        report = f"Loaded {len(loaded)} tensors from {self._source}"
        if fresh_blocks:
            report += f"; non-local blocks that start fresh: {', '.join(fresh_blocks)}"
        missing = not_loaded - _below(fresh_blocks, not_loaded)

        body = _classifier_parts(self.model)
        if loaded and loaded == _below(body, loaded):
            detector = missing - _below(body, missing)
            missing -= detector
            if detector:
                report += f"; the {len(detector)} tensors of the detector around it start fresh"
        logger.info(f"{report}; nothing else is missing." if not missing else f"{report}.")
        if missing:
            logger.warning(
                f"NOT LOADED: {len(missing)} tensors of the model have no weights in "
                f"{self._source} and keep their initial values. "
                + get_missing_parameters_message(sorted(missing))
            )
        for key, in_checkpoint, in_model in incompatible.incorrect_shapes:
            logger.warning(
                f"NOT LOADED: {key} has shape {in_checkpoint} in the checkpoint and {in_model} "
                "in the model."
            )
        if incompatible.unexpected_keys:
            unused = sorted(incompatible.unexpected_keys)
            has_blocks = any("nonlocal" in key for key in unused)
            logger.log(
                logging.WARNING if has_blocks else logging.INFO,
                f"Not used by the model, though in {self._source}: {', '.join(unused)}"
                + (
                    ". They include non-local blocks: set MODEL.BACKBONE.NAME and MODEL.NONLOCAL "
                    "as they were when it was trained."
                    if has_blocks
                    else ""
                ),
            )


def _below(modules: Iterable[str], keys: Iterable[str]) -> set[str]:
    """Those keys that belong to one of the modules."""
    prefixes = tuple(f"{name}." for name in modules)
    return {key for key in keys if key.startswith(prefixes)}


def _classifier_parts(model: nn.Module) -> list[str]:
    """The modules of a detector that weights trained for image classification can fill."""
    has_fpn = hasattr(getattr(model, "backbone", None), "bottom_up")
    # The C4 models have the backbone's last stage in their RoI heads.
    return ["backbone.bottom_up" if has_fpn else "backbone", "roi_heads.res5"]
