"""A model that blocks are put into: its modules by name, and what they return."""

from __future__ import annotations

import math
from typing import Any

from detectron2.modeling import Backbone
from torch import nn

from nl_detectron.surgery import HEIGHT, WIDTH, DryRun, describe, dry_run, is_feature_map, like


class PlacementError(ValueError):
    """A model does not have the place that a block is asked for, or the block does not fit."""


class Network:
    """A model; parts of it are run, once each, when that is needed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self._runs: dict[nn.Module, DryRun] = {}

    def around(self, module: nn.Module) -> list[nn.Module]:
        """What a module is in, from the model to the module itself."""
        path = self.names[module].split(".") if module is not self.model else []
        return [self.model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]

    def run(self, module: nn.Module) -> DryRun:
        """A run of the backbone that a module is in, or else of the model."""
        part = self._part(module)
        if part not in self._runs:
            self._runs[part] = dry_run(part, _inputs(part))
        return self._runs[part]

    def channels(self, module: nn.Module, name: str, trusted: bool = False) -> int:
        """Of what a module returns. It has ``name`` in messages; ``trusted``, it knows itself."""
        sizes = (getattr(module, n, 0) for n in ("out_channels", "num_features", "num_channels"))
        known = next((size for size in sizes if size and isinstance(size, int)), 0)
        part = self._part(module)
        if known and (trusted or _is_detector(part)):
            return known
        run, what = self.run(module), f"{name} (a {type(module).__name__})"
        if module not in run.outputs and run.error is None:
            raise PlacementError(
                f"{what} is not called when {type(part).__name__} runs, so that a block after it "
                "would do nothing, even if its weights are read"
            )
        if module in run.outputs:
            output = run.outputs[module]
            if is_feature_map(output):
                return output.shape[1]
            raise PlacementError(
                f"{what} returns {describe(output)}, but a block needs one tensor (B, C, H, W)"
                + self._instead(module, run)
            )
        if known:
            return known
        raise PlacementError(
            f"the channels after {what} are not known: it has no out_channels, and "
            f"{type(part).__name__} does not run on an image of zeros ({run.error})"
        )

    def _part(self, module: nn.Module) -> nn.Module:
        backbones = (m for m in self.around(module) if isinstance(m, Backbone))
        return next(backbones, self.model)

    def _instead(self, module: nn.Module, run: DryRun) -> str:
        """The next place that would do, no deeper in the model than this one."""
        called: list[Any] = [other for other in run.outputs if other in self.names]
        here, depth = called.index(module), self.names[module].count(".")
        for other in called[here:] + called[:here][::-1]:
            name = self.names[other]
            if name and name.count(".") <= depth and is_feature_map(run.outputs[other]):
                return f", as {name!r} returns"
        return ""


def innermost_backbone(model: nn.Module) -> nn.Module:
    """The innermost of the :class:`Backbone` s in one another, such as an FPN's ResNet."""
    inner = [m for m in model.modules() if m is not model and isinstance(m, Backbone)]
    return innermost_backbone(inner[0]) if inner else model


def _is_detector(model: nn.Module) -> bool:
    return not isinstance(model, Backbone) and innermost_backbone(model) is not model


def _inputs(model: nn.Module) -> Any:
    convolutions = (m for m in innermost_backbone(model).modules() if isinstance(m, nn.Conv2d))
    channels = getattr(next(convolutions, None), "in_channels", 3)
    unit = math.lcm(32, getattr(model, "size_divisibility", 0) or 32)
    image = like(model).new_zeros(1, channels, HEIGHT * unit, WIDTH * unit)
    return [{"image": image[0]}] if _is_detector(model) else image
