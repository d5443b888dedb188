"""What all blocks have in common that attend to positions of their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nl_detectron.layers.detectron2_parts import CNNBlockBase
from nl_detectron.validation import check_choice

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""The convolution for a number of dimensions."""


class AttentionBlock(CNNBlockBase):
    """
    A Detectron2 block whose output has the shape of its input, and that tells what it attends to
    and what that adds to its input. Subclasses define both, and ``forward``.

    Attributes:
        dims: 1 for sequences (B, C, L), 2 for images (B, C, H, W), 3 for video (B, C, T, H, W).
        pairwise: what its weights are, a key of :data:`nl_detectron.layers.ATTENTION`.
        subsample: how its keys are made of the input, one of :data:`nl_detectron.layers.SUBSAMPLE`.
    """

    def __init__(
        self, in_channels: int, *, dims: int, pairwise: str, subsample: str = "none"
    ) -> None:
        """
        Make a block without children.

        Args:
            in_channels: C, channels of input and output.
            dims, pairwise, subsample: see the attributes.

        Raises:
            ValueError: dims is none of 1, 2, 3.
        """
        super().__init__(in_channels, in_channels, stride=1)
        check_choice("dims", dims, tuple(CONV))
        self.dims = dims
        self.pairwise = pairwise
        self.subsample = subsample

    def attention(self, x: Tensor, positions: Tensor | Sequence) -> Tensor:
        """
        What some positions attend to.

        Args:
            x: (B, C, *grid), what the block is given.
            positions: the query positions, the same for each of the batch: integers (Q,), indices
                into the flattened grid, or (Q, dims), coordinates in the order of the grid (row,
                column for images).

        Returns:
            (B, Q, *key grid), the weights of the keys for each of these queries.
        """
        raise NotImplementedError

    def values(self, x: Tensor) -> Tensor:
        """
        What each key adds to the output of a query, for each unit of the weight that the query
        gives it in :meth:`attention`, in inference.

        Args:
            x: (B, C, *grid), what the block is given.

        Returns:
            (B, C, *key grid).
        """
        raise NotImplementedError

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: a {self.dims}-D {type(self).__name__} of "
                f"{self.in_channels} channels needs (batch, {self.in_channels}"
                + ", size" * self.dims
                + ")"
            )


def flat_positions(x: Tensor) -> Tensor:
    """(B, C, *grid) to (B, N, C), N the number of positions in the grid."""
    return x.flatten(2).transpose(1, 2)


def flat_index(positions: Tensor | Sequence, x: Tensor) -> Tensor:
    """
    (Q,), indices into the flattened grid of x (B, C, *grid), of such indices or of coordinates (Q,
    dims). ValueError: they are no integers, have another shape, or lie outside the grid.
    """
    positions, grid = torch.as_tensor(positions, device=x.device), x.shape[2:]
    if positions.numel() == 0:  # the dtype of an empty list says nothing
        positions = positions.long()
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"positions are {positions.dtype}, but must be integers")
    if positions.dim() == 1:
        sizes = [grid.numel()]
    elif positions.dim() == 2 and positions.shape[1] == len(grid):
        sizes = list(grid)
    else:
        raise ValueError(
            f"positions have shape {tuple(positions.shape)}, but must have shape (Q,), indices "
            f"into the flattened grid, or (Q, {len(grid)}), coordinates"
        )
    index = positions.new_zeros(positions.shape[0], dtype=torch.long)
    for size, coordinate in zip(sizes, positions.reshape(-1, len(sizes)).unbind(1)):
        if ((coordinate < 0) | (coordinate >= size)).any():
            raise ValueError(f"positions {positions.tolist()} leave the grid {tuple(grid)}")
        index = index * size + coordinate
    return index
