"""The global context block of "GCNet" (https://arxiv.org/abs/1904.11492)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nl_detectron.layers.attention_block import CONV, AttentionBlock, flat_index, flat_positions
from nl_detectron.layers.children import evaluating, in_full_precision
from nl_detectron.layers.numerics import accumulable, no_autocast, saturated
from nl_detectron.layers.pairwise import softmax_average
from nl_detectron.validation import ArgumentError


class GlobalContextBlock(AttentionBlock):
    """
    z_i = x_i + W_2 ReLU(LN(W_1 sum_j softmax_j(w_k x_j) x_j)) (Figure 4d of GCNet): every position
    attends to the same places, so that what is added is the same everywhere, and costs next to
    nothing.

    The block's children are ``context`` (w_k), ``reduce`` (W_1), ``norm`` (LN) and ``out`` (W_2);
    the convolutions are 1x1, with bias. GCNet adds this inside of a residual block, before the
    shortcut is added; Detectron2's residual blocks have no place for it there, so it comes after
    the sum and its ReLU, as a non-local block does.
    """

    def __init__(
        self, in_channels: int, *, reduction: int = 16, dims: int = 2, zero_init: bool = True
    ) -> None:
        """
        Make a block with random weights that is the identity, if ``zero_init`` is left at True.

        Args:
            in_channels: C, channels of input and output.
            reduction: W_1 has C // reduction rows; GCNet's are 16 and 4.
            dims: 1 for sequences (B, C, L), 2 for images (B, C, H, W), 3 for video (B, C, T, H, W).
            zero_init: start as the identity, with W_2 at zero.

        Raises:
            ValueError: dims or reduction is not legal. C // reduction is at least 2: the layer norm
                of a single channel is a constant, which nothing could be learnt through.
        """
        super().__init__(in_channels, dims=dims, pairwise="global_context")
        if not isinstance(reduction, int) or not 1 <= reduction <= in_channels // 2:
            raise ArgumentError(
                "reduction",
                f"is {reduction!r}, but must be an integer from 1 to "
                f"in_channels // 2 = {in_channels // 2}",
            )
        conv = CONV[dims]
        self.context = conv(in_channels, 1, kernel_size=1)
        self.reduce = conv(in_channels, in_channels // reduction, kernel_size=1)
        self.norm = nn.LayerNorm(in_channels // reduction)
        self.out = conv(in_channels // reduction, in_channels, kernel_size=1)
        for convolution in (self.context, self.reduce, self.out):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.get_parameter("bias"))
        if zero_init:
            nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """
        Add to each position the same, made of what all attend to.

        Args:
            x: (B, C, *grid), floating point; grid is L, H x W or T x H x W. B may be 0.

        Returns:
            z, same shape and dtype.

        Raises:
            ValueError: x has another number of dimensions or channels than the block.
        """
        logits = self._logits(x)
        with no_autocast(x):  # it is done in float32: these are vectors
            z = self._transform(softmax_average(logits, flat_positions(x)))
        return x + saturated(z, x.dtype).view(z.shape + (1,) * self.dims)

    def attention(self, x: Tensor, positions: Tensor | Sequence) -> Tensor:
        """
        The weights softmax_j(w_k x_j), which are the same for all positions.

        Args:
            x: (B, C, *grid) as in :meth:`forward`.
            positions: the query positions: integers (Q,), indices into the flattened grid, or
                (Q, dims), coordinates in the order of the grid.

        Returns:
            (B, Q, *grid), float32 for half precision x; they sum to 1 over the grid.

        Raises:
            ValueError: x does not fit the block, or positions have the wrong shape or lie outside.
        """
        count = len(flat_index(positions, x))
        weights = accumulable(self._logits(x)).softmax(1).unflatten(1, x.shape[2:])
        return weights.unsqueeze(1).expand(-1, count, *x.shape[2:])

    def values(self, x: Tensor) -> Tensor:
        """
        What each position adds to the output for each unit of its weight, to first order: J x_j,
        with J the derivative of W_2 ReLU(LN(W_1 .)) at the context, sum_j softmax_j(w_k x_j) x_j.

        Args:
            x: (B, C, *grid) as in :meth:`forward`.

        Returns:
            (B, C, *grid), float32 for half precision x.

        Raises:
            ValueError: x does not fit the block.
        """
        weights, positions = accumulable(self._logits(x)).softmax(1), accumulable(flat_positions(x))
        with evaluating(self), no_autocast(x):
            context = (weights.unsqueeze(1) @ positions).repeat(1, positions.shape[1], 1)
            inputs = context.flatten(0, 1), positions.flatten(0, 1)
            values = torch.func.jvp(self._transform, inputs[:1], inputs[1:])[1]
        return values.view(positions.shape).mT.unflatten(2, x.shape[2:])

    def _logits(self, x: Tensor) -> Tensor:
        """w_k x_j, (B, N)."""
        self._check_input(x)
        return self.context(x).flatten(1)

    def _transform(self, context: Tensor) -> Tensor:
        """W_2 ReLU(LN(W_1 context)), (B, C), float32 or float64."""
        ones = (1,) * self.dims
        z = in_full_precision(self.reduce, context.view(*context.shape, *ones)).flatten(1)
        z = in_full_precision(self.norm, z).relu()
        return in_full_precision(self.out, z.view(*z.shape, *ones)).flatten(1)
