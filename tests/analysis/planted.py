"""A detector whose attention is known: a place attends to what is as bright as itself."""

import numpy as np
from detectron2.structures import ImageList
from torch import nn

from nl_detectron import NonLocalBlock

STRIDE = 16


class PlantedDetector(nn.Module):
    """
    Its backbone is a mean over cells of 16 x 16 pixels, and on that a block, a Gaussian by
    default. It finds nothing.
    """

    def __init__(self, size_divisibility=32, block=None, **block_options):
        super().__init__()
        options = {"pairwise": "gaussian", "scale": False, **block_options}
        block = block or NonLocalBlock(3, reduction=1, **options)
        # As most backbones, it rounds sizes up.
        self.backbone = nn.Sequential(nn.AvgPool2d(STRIDE, ceil_mode=True), block)
        self.size_divisibility = size_divisibility

    def forward(self, batched_inputs):
        images = [inputs["image"] / 50 for inputs in batched_inputs]
        self.backbone(ImageList.from_tensors(images, self.size_divisibility).tensor)
        return [{} for _ in batched_inputs]


def image_with_bright_cells(height, width, *cells):
    """(height, width, 3) uint8, black but for the cells at these (row, column)."""
    image = np.zeros((height, width, 3), np.uint8)
    for row, column in cells:
        image[STRIDE * row : STRIDE * (row + 1), STRIDE * column : STRIDE * (column + 1)] = 255
    return image


def centre(row, column):
    """x, y of a cell's centre in pixels."""
    return STRIDE * (column + 0.5), STRIDE * (row + 0.5)
