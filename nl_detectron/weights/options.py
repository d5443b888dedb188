"""What the caller knows about the weights and the file does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nl_detectron.validation import check_choice


@dataclass(frozen=True)
class Options:
    """
    The keywords of :func:`nl_detectron.weights.convert`. None means "not given".

    Attributes:
        pairwise, scale, subsample: what the source computes, in the words of
            :class:`NonLocalBlock`.
        norm: its norm, where the file has one without running statistics ("GN" or "LN"), or
            another of Detectron2's batch norms than "BN".
        norm_eps: epsilon of the source's batch norm, if it is not the implementation's default.
        temperature: what the logits of "disentangled" are divided by, if it is not 0.05.
        dims: 1, 2 or 3; by default 2 for "nl_detectron", 3 for "pytorchvideo" and the source's for
            "mmcv".
        rename: the source's name of a block, or of what it is in, to the target's; "" is the root.
    """

    pairwise: str | None = None
    scale: bool | None = None
    subsample: str | None = None
    norm: str | None = None
    norm_eps: float | None = None
    temperature: float | None = None
    dims: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("dims", self.dims, (None, 1, 2, 3))
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature!r}, but must be a number above 0")
