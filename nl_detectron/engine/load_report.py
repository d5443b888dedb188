"""What became of every tensor when weights were loaded into a model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from fvcore.common.checkpoint import get_missing_parameters_message
from tabulate import tabulate
from torch import Tensor, nn

from nl_detectron.engine.block_settings import Shapes, block_of, block_settings
from nl_detectron.modeling import find_stages, nonlocal_blocks


class LoadReport:
    """
    The tensors of a checkpoint and of the model that it was loaded into, each in one place.

    Attributes:
        shapes: shapes of the checkpoint's tensors, under the model's names where they match.
        loaded: the model's tensors that have their values from the checkpoint.
        fresh: those that keep their initial values because the checkpoint has nothing for them.
        mismatched: names of both with the shapes in the checkpoint and in the model; not loaded.
        unused: the checkpoint's tensors for which the model has no place.
    """

    def __init__(self, model: nn.Module, source: str, shapes: Shapes, incompatible: Any) -> None:
        """After loading from ``source``, with fvcore's record of what it has not loaded."""
        self._model, self._source, self.shapes = model, source, shapes
        unused = set(incompatible.unexpected_keys)
        missing = set(incompatible.missing_keys)
        mismatched = {key: (old, new) for key, old, new in incompatible.incorrect_shapes}
        own_shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        # Matching by suffix, Detectron2 counts another shape as a missing and an unused tensor.
        for short in sorted(unused):
            for key in {key for key in missing if key.endswith(f".{short}")}:
                if own_shapes[key] != shapes[short]:
                    mismatched[key] = (tuple(shapes[short]), own_shapes[key])
                    unused.discard(short)
        # A checkpoint may lack batch norm's counters without their being reported as missing.
        tensors = {key for key in own_shapes if not key.endswith("num_batches_tracked")}
        # Detectron2 makes up the statistics of a frozen norm that has none.
        self.loaded = tensors & set(shapes) - missing - mismatched.keys()
        self.fresh = missing - mismatched.keys()
        self.mismatched, self.unused = mismatched, unused

        blocks = nonlocal_blocks(model)
        self._fresh_blocks = [name for name in blocks if not _below([name], tensors - self.fresh)]
        in_blocks = _below(self._fresh_blocks, self.fresh)
        has_fpn = hasattr(getattr(model, "backbone", None), "bottom_up")
        # What a classifier's weights can fill: C4 models have its last stage in their RoI heads.
        body = ["backbone.bottom_up" if has_fpn else "backbone", "roi_heads.res5"]
        is_classifier = bool(self.loaded) and self.loaded == _below(body, self.loaded)
        around = self.fresh - _below(body, self.fresh) - in_blocks
        self._fresh_detector = around if is_classifier else set()
        self._not_in_blocks = self.fresh - in_blocks
        self._forgotten = self._not_in_blocks - self._fresh_detector

    @property
    def summary(self) -> str:
        """What was loaded and what is meant to start fresh, in one line."""
        line = f"Loaded {len(self.loaded)} tensors from {self._source}"
        if self._fresh_blocks:
            line += f"; non-local blocks that start fresh: {', '.join(self._fresh_blocks)}"
        if around := len(self._fresh_detector):
            line += f"; the {around} tensors of the detector around it start fresh"
        complete = not self._forgotten and not self.mismatched
        return f"{line}; nothing else is missing." if complete else f"{line}."

    @property
    def warnings(self) -> list[str]:
        """One for each kind of tensor that was not loaded and is not meant to start fresh."""
        warnings = []
        if self._forgotten:
            warnings.append(
                f"NOT LOADED: {len(self._forgotten)} tensors of the model have no weights in "
                f"{self._source} and keep their initial values. "
                + get_missing_parameters_message(sorted(self._forgotten))
            )
        shapes = [
            f"{key} has shape {in_checkpoint} in the checkpoint and {in_model} in the model"
            for key, (in_checkpoint, in_model) in self.mismatched.items()
        ]
        if shapes:
            warnings.append(f"NOT LOADED: {'; '.join(shapes)}. What does not fit starts fresh.")
        return warnings

    @property
    def table(self) -> str:
        """Every tensor of the model, except batch norm's counters, and what became of it, as a
        table. What was loaded is put together by modules; what starts fresh is described by its
        values."""
        state_dict = self._model.state_dict()
        others = {*self.fresh, *self.mismatched}
        modules: dict[str, list[str]] = {}
        for name in state_dict:
            if name in self.loaded:
                modules.setdefault(_largest_module(name, others), []).append(name)
        rows = []
        for module, names in modules.items():
            sizes = [state_dict[name].numel() for name in names]
            is_tensor = names == [module]
            detail = f"{tuple(state_dict[module].shape)}" if is_tensor else f"{len(sizes)} tensors"
            rows.append(("loaded", module, f"{detail}, {sum(sizes):,} values"))
        for name, tensor in state_dict.items():
            if name in self.fresh:
                rows.append(("fresh", name, f"{tuple(tensor.shape)} {_describe(tensor)}"))
        for name, (in_checkpoint, in_model) in self.mismatched.items():
            detail = f"{in_checkpoint} in the checkpoint, {in_model} in the model"
            rows.append(("shape mismatch", name, detail))
        for name in sorted(self.unused):
            rows.append(("unused", name, f"{tuple(self.shapes[name])} in the checkpoint"))
        return tabulate(rows, headers=("", "tensor", "values"), tablefmt="pipe")

    @property
    def strict_problems(self) -> list[str]:
        """Everything but fresh non-local blocks, in words."""
        kinds = {
            "fresh": self._not_in_blocks,
            "of another shape": set(self.mismatched),
            "unused": self.unused,
        }
        return [
            f"{len(names)} {kind}: {', '.join(sorted(names))}"
            for kind, names in kinds.items()
            if names
        ]

    @property
    def block_problem(self) -> str | None:
        """What to set, if the checkpoint has non-local blocks that the model lacks or has in
        another form; else None. Blocks that only the model has are no problem: they start fresh."""
        lacking = {block_of(name) for name in (*self.unused, *self.mismatched)}
        partly = {block_of(name) for name in self.fresh} & {block_of(n) for n in self.loaded}
        blocks = sorted(block for block in lacking | partly if block)
        if not blocks:
            return None
        own_shapes = {name: tensor.shape for name, tensor in self._model.state_dict().items()}
        stages = list(find_stages(getattr(self._model, "backbone", self._model)))
        default = {"MODEL.NONLOCAL.BLOCK": "NonLocalBlock"}
        present = {**default, **block_settings(own_shapes, stages)}
        wanted = {**default, **block_settings(self.shapes, stages)}
        changes = [f"{key} {value}" for key, value in wanted.items() if present.get(key) != value]
        advice = "Set " + "\n    ".join(["", *changes]) if changes else "\n".join(self.warnings)
        return (
            f"{self._source} has non-local blocks that this model lacks or has in another form: "
            f"{', '.join(blocks)}. {advice}"
        )


def _below(modules: Iterable[str], keys: Iterable[str]) -> set[str]:
    """Those keys that belong to one of the modules."""
    prefixes = tuple(f"{name}." for name in modules)
    return {key for key in keys if key.startswith(prefixes)}


def _largest_module(name: str, others: set[str]) -> str:
    """The largest module around a tensor that holds none of the others."""
    for module in accumulate(name.split(".")[:-1], "{}.{}".format):
        if not _below([module], others):
            return f"{module}.*"
    return name


def _describe(tensor: Tensor) -> str:
    """How a tensor was initialised, as far as its values tell."""
    values = tensor.detach().to(torch.float64)
    if values.numel() == 0:
        return ""
    first = values.flatten()[0].item()
    if (values == first).all():
        return f"all {first:g}"
    return f"random: mean {values.mean():.1e}, std {values.std():.1e}"
