"""The registered keypoint head with non-local blocks (Section 6.1 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_KEYPOINT_HEAD_REGISTRY
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from torch import nn

from nl_detectron.layers import NonLocalBlock
from nl_detectron.modeling.blocks import build_block
from nl_detectron.modeling.first_step import announce_at_first_step
from nl_detectron.surgery import insert_child


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class NonLocalKeypointHead(KRCNNConvDeconvUpsampleHead):
    """
    Detectron2's keypoint head with a non-local block after every few of its convolutions (and
    their ReLU). The paper has 8 convolutions and a block after every 2. The head's own parameters
    keep their names; the blocks are ``nonlocal2``, ``nonlocal4``, ... after ``conv_fcn2``, ...
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: list[int],
        nonlocal_every: int,
        make_block: Callable[..., nn.Module] = NonLocalBlock,
        nonlocal_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape, conv_dims, **kwargs: as of ``KRCNNConvDeconvUpsampleHead``.
            nonlocal_every: a block after every so many convolutions; 0 is none.
            make_block: from a number of channels to a block that keeps channels and size.
            nonlocal_options: keyword arguments of ``make_block``.

        Raises:
            ValueError: ``nonlocal_every`` is negative or more than there are convolutions, or
                ``make_block`` refuses an option.
        """
        if not 0 <= nonlocal_every <= len(conv_dims):
            raise ValueError(
                f"MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY is {nonlocal_every}, but must be from 0 "
                f"(no blocks) to {len(conv_dims)}, the number of convolutions in the head"
            )
        super().__init__(input_shape, conv_dims=conv_dims, **kwargs)
        # Only now: the parent's own initialisation runs over every parameter it finds.
        inserted = []
        every = nonlocal_every or len(conv_dims) + 1
        for number in range(every, len(conv_dims) + 1, every):
            name, channels = f"nonlocal{number}", conv_dims[number - 1]
            block = make_block(channels, **(nonlocal_options or {}))
            insert_child(self, f"conv_fcn_relu{number}", name, block)
            inserted.append((name, block, channels))
        announce_at_first_step(self, inserted)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {
            **super().from_config(cfg, input_shape),
            "make_block": partial(build_block, cfg),
            "nonlocal_every": cfg.MODEL.NONLOCAL.KEYPOINT_HEAD_EVERY,
        }
