"""A place within Detectron2's bottleneck: between its sum and its last ReLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional

from nl_detectron.surgery import attach


class SumBottleneckBlock(BottleneckBlock):
    """A bottleneck with a child ``sum``, through which its sum goes before the last ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu_(self.conv2(functional.relu_(self.conv1(x))))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return functional.relu(self.sum(self.conv3(out) + shortcut))


def attach_to_sum(bottleneck: Any, block: nn.Module) -> Callable[[], None]:
    """Apply a block to a bottleneck's sum, as ``sum.nonlocal``; gives the way back."""
    kind, bottleneck.__class__ = type(bottleneck), SumBottleneckBlock
    bottleneck.sum = nn.Identity()
    attach(bottleneck.sum, block)

    def detach() -> None:
        del bottleneck.sum
        bottleneck.__class__ = kind

    return detach
