"""What is measured: a non-local block after a ResNet stage, for one image size."""

from __future__ import annotations

from dataclasses import dataclass

# Name to channels and stride.
STAGES = {"res2": (256, 4), "res3": (512, 8), "res4": (1024, 16), "res5": (2048, 32)}
IMAGE_SIZE = (800, 1344)  # Detectron2's usual size, padded to a multiple of the last stride
QUICK_IMAGE_SIZE = (128, 192)


@dataclass(frozen=True)
class Case:
    """
    One block on one input. ``image_size`` is (height, width) in pixels; ``pairwise`` and
    ``subsample`` are those of :class:`~nl_detectron.layers.NonLocalBlock`.
    """

    stage: str
    pairwise: str
    subsample: str = "none"
    batch: int = 1
    image_size: tuple[int, int] = IMAGE_SIZE

    @property
    def channels(self) -> int:
        return STAGES[self.stage][0]

    @property
    def grid(self) -> tuple[int, int]:
        stride = STAGES[self.stage][1]
        height, width = self.image_size
        return height // stride, width // stride

    @property
    def key_grid(self) -> tuple[int, int]:
        height, width = self.grid
        return self.grid if self.subsample == "none" else (height // 2, width // 2)

    @property
    def scale(self) -> bool:
        """The others scale the logits of the embedded Gaussian, but not those of the Gaussian."""
        return self.pairwise == "embedded_gaussian"

    def __str__(self) -> str:
        return f"{self.stage} {self.pairwise}, subsample {self.subsample}"
