"""Loading weights, and saying plainly which tensors got them and which did not."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nl_detectron.engine.load_report import LoadReport
from nl_detectron.engine.run_config import find_checkpoint
from nl_detectron.files import whole_file
from nl_detectron.weights.checkpoint_io import (
    WRAPPERS,
    CheckpointError,
    as_tensor,
    load_checkpoint,
    split_checkpoint,
    why_unsound,
    with_plain_names,
)

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"model_(\d+)\.pth")
_OTHERS = "Those of other implementations have to be converted: tools/convert_weights.py"


class NonLocalCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer, with a report that separates what is meant to start fresh (the
    non-local blocks of a model that is given weights without them; the detector around a
    classifier's weights) from what is missing. Files are read as data, and run nothing; they are
    written whole or not at all, and their checksums are compared when they are read.

    Attributes:
        resumed: did :meth:`resume_or_load` go on from a checkpoint, trainer and all?
        resumed_from: the file that it went on from; else empty.
        note: what :meth:`resume_or_load` found amiss, in one line; else empty.
        saved_iteration: the iteration after which was saved last; None if nothing was.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        strict: bool = False,
        report: bool = False,
        keep_last: int = 0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: a wrapped one is loaded and saved under the names that it has unwrapped.
            save_dir: the folder that checkpoints are saved in.
            strict: nothing but non-local blocks may start fresh, and nothing be left over.
            report: log a table of all tensors and of what became of them.
            keep_last: how many checkpoints to keep beside ``model_final.pth``; 0 keeps all.
            **kwargs: those of ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.model = without_wrapper(model)
        self.path_manager: Any = _WholeFiles(self.path_manager)
        self.keep_last = keep_last
        self.resumed = False
        self.resumed_from = ""
        self.note = ""
        self.saved_iteration: int | None = None
        self.strict = strict
        self.report = report

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Load weights from a file or URL, and what else it holds, as ``DetectionCheckpointer.load``
        does, and return what was not used of it. An empty ``path`` loads nothing.

        Raises:
            CheckpointError: the file is no checkpoint; it has non-local blocks that the model lacks
                or has in another form (the message says what to set); or with ``strict``, anything
                but non-local blocks starts fresh or is left over.
        """
        if self.strict and not path:
            raise CheckpointError("Strict loading, but MODEL.WEIGHTS is empty: all starts fresh")
        self._source = path
        try:
            with plain_modules(self.model):
                return super().load(path, *args, **kwargs)
        except CheckpointError:
            raise
        # What is of another type than Detectron2 expects fails there with any of these.
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path} cannot be loaded: {type(error).__name__}: {reason}"
            ) from error

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Save the model, the trainer and ``kwargs``, such as ``iteration``, as ``name``.pth; then
        remove what is older than ``keep_last`` checkpoints.

        Raises:
            OSError: the disk is full, for one; all that was saved before is still there.
        """
        with plain_modules(self.model):
            super().save(name, **kwargs)
        self.saved_iteration = kwargs.get("iteration")
        if self.keep_last and self.saved_iteration is not None and self.save_to_disk:
            matches = map(_NUMBERED.fullmatch, os.listdir(self.save_dir))
            numbers = sorted((int(match[1]), match[0]) for match in matches if match)
            # Those of later iterations are of another run, which was here before.
            ours = [file for number, file in numbers if number <= self.saved_iteration]
            for file in ours[: -self.keep_last]:
                Path(self.save_dir, file).unlink()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Say in ``last_checkpoint`` what to go on from, unless it has weights alone."""
        if self.checkpointables:
            super().tag_last_checkpoint(last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """With ``resume``, go on from the checkpoint that ``last_checkpoint`` names, or if that is
        missing or damaged, from the newest sound one in the folder; if there is none, or without
        ``resume``, load the weights ``path``. It returns and raises what :meth:`load` does;
        ``resumed`` and ``note`` tell the rest."""
        found, self.resumed, self.note = "", False, ""
        if resume:  # the main process decides for all
            mine = self._find_checkpoint() if comm.is_main_process() else None
            found, self.resumed, self.note = comm.all_gather(mine)[0]
        self.resumed_from = found if self.resumed else ""
        if self.note and (self.resumed or not self.checkpointables):
            logger.warning(self.note)
        return self.load(found or path, checkpointables=None if self.resumed else [])

    def _find_checkpoint(self) -> tuple[str, bool, str]:
        """The file to go on from ("" if none), whether its trainer is to go on, too, the note."""
        found = find_checkpoint(self.save_dir)
        note = found.note
        if found.path and not found.trainer and self.checkpointables:
            note = (
                f"{found.path} has weights alone, no state of a trainer: training starts at 0 with "
                "them"
            )
        return found.path, bool(found.trainer and self.checkpointables), note

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
        weights, others = split_checkpoint(content)
        if weights is content:  # beside the tensors may be anything else
            own, kinds = self.model.state_dict(), (Tensor, np.ndarray, np.generic)
            weights = OrderedDict(
                (name, value)
                for name, value in content.items()
                if isinstance(value, kinds) or "." in name or name in own
            )
            if hasattr(content, "_metadata"):  # the versions of modules
                weights._metadata = content._metadata  # type: ignore[attr-defined]
        content = {**others, "model": with_plain_names(weights)}
        url = getattr(self, "_parsed_url_during_load", None)  # Detectron2 0.6 has no queries
        if url is not None and url.query == "matching_heuristics=True":
            content["matching_heuristics"] = True
        return content

    def _convert_ndarray_to_tensor(self, state_dict: dict[str, Any]) -> None:
        # Called last with what is then loaded, under the model's names.
        if not isinstance(state_dict, dict):
            raise CheckpointError(f"{self._source} has no state dict: {type(state_dict).__name__}")
        for name, value in state_dict.items():
            try:
                state_dict[name] = as_tensor(f"{name!r} in it", value)
            except ValueError as error:
                raise CheckpointError(
                    f"{self._source} is not a checkpoint of Detectron2: {error}. {_OTHERS}"
                ) from error
        super()._convert_ndarray_to_tensor(state_dict)
        own = self.model.state_dict()
        problems = {name: why_unsound(name, t, own.get(name)) for name, t in state_dict.items()}
        if bad := [f"{name} {problem}" for name, problem in problems.items() if problem]:
            others = f" (and {len(bad) - 1} more tensors like it)" if len(bad) > 1 else ""
            raise CheckpointError(f"{self._source} has no sound weights: {bad[0]}{others}")
        self._state_dict = state_dict

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Log what was loaded; see :meth:`load` for what it raises."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self._state_dict.items()}
        shapes.update({name: shape for name, shape, _ in incompatible.incorrect_shapes})
        del self._state_dict
        report = LoadReport(self.model, self._source, shapes, incompatible)
        if self.report:
            logger.info(f"Weights from {self._source}:\n{report.table}")
        if problem := report.block_problem:
            raise CheckpointError(problem)
        if not report.loaded:
            first = f", such as {next(iter(report.shapes))}" if report.shapes else ""
            raise CheckpointError(
                f"None of the {len(report.shapes)} tensors in {self._source}{first}, fits the "
                f"model. {_OTHERS}"
            )
        if self.strict and (problems := report.strict_problems):
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


class _WholeFiles:
    """Detectron2's file manager, but files that are written appear whole or not at all."""

    def __init__(self, path_manager: Any) -> None:
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    @contextlib.contextmanager
    def open(self, path: str, mode: str = "r", **options: Any) -> Iterator[Any]:
        if "w" in mode and "://" not in path:
            with whole_file(path) as draft, draft.open(mode, **options) as file:
                yield file
        else:
            with self._path_manager.open(path, mode, **options) as file:
                yield file


def _without(weights: Any, suffix: str) -> Any:
    """A state dict less the tensors whose names end so; anything else as it is."""
    if not isinstance(weights, dict):
        return weights
    return {name: value for name, value in weights.items() if not str(name).endswith(suffix)}


def without_wrapper(module: nn.Module) -> nn.Module:
    """The module itself, if it is one that wraps another; data-parallel ones included."""
    while True:
        children = dict(module.named_children())
        inner = next((children[name] for name in WRAPPERS if name in children), None)
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


@contextlib.contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Within the ``with``, modules below ``model`` have the names that they have unwrapped."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name not in WRAPPERS and without_wrapper(child) is not child
    ]
    try:
        for parent, name, child in wrapped:
            setattr(parent, name, without_wrapper(child))
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)
