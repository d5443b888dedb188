"""The non-local block of "Non-local Neural Networks" (https://arxiv.org/abs/1711.07971)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nl_detectron.layers.attention_block import (
    CONV,
    AttentionBlock,
    flat_index,
    flat_positions,
)
from nl_detectron.layers.norm import (
    ZERO_INIT_LAYERS,
    Norm,
    build_norm,
    inference_scale,
    make_identity,
)
from nl_detectron.layers.numerics import accumulable, no_autocast, saturated
from nl_detectron.layers.pairwise import (
    PAIRWISE,
    concatenation_pairwise,
    concatenation_weights,
    disentangled_pairwise,
    disentangled_weights,
    dot_product_pairwise,
    dot_product_weights,
    softmax_pairwise,
    softmax_weights,
)
from nl_detectron.layers.subsampling import SUBSAMPLE, max_pool, pyramid_pool
from nl_detectron.validation import ArgumentError, check_choice

_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class NonLocalBlock(AttentionBlock):
    """
    z = W_z y + x with the non-local operation y of Eq. 1 (Eq. 6 and Figure 2 of the paper), as a
    Detectron2 block: input and output have the same shape, so that it fits between any two others.

    The block's children are the paper's ``theta``, ``phi``, ``g`` (1x1 convolutions to
    ``in_channels // reduction`` channels; the plain Gaussian has neither theta nor phi), for the
    concatenation ``concat`` (w_f, whose first half belongs to theta), for "disentangled" ``unary``
    (m, to one channel), ``out`` (W_z) and ``norm``.
    Convolutions start at N(0, 0.01^2) with zero bias, as in the released code; w_f has no bias.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dims: int = 2,
        pairwise: str = "embedded_gaussian",
        reduction: int = 2,
        scale: bool = True,
        temperature: float = 0.05,
        subsample: str = "none",
        norm: Norm = "BN",
        zero_init: bool = True,
        zero_init_layer: str = "norm",
        use_act_checkpoint: bool = False,
        key_channels: int | None = None,
    ) -> None:
        """
        Args:
            in_channels: C, channels of input and output.
            dims: 1 for sequences (B, C, L), 2 for images (B, C, H, W), 3 for video (B, C, T, H, W).
            pairwise: the pairwise function f of Section 3.2: "gaussian", "embedded_gaussian",
                "dot_product" or "concatenation"; or "disentangled", see
                :func:`nl_detectron.layers.pairwise.disentangled_pairwise`.
            reduction: the embeddings have C // reduction channels; the paper halves (Section 3.3).
            scale: for the two Gaussians and "disentangled", multiply the logits of the pairs by
                d ** -0.5, d being the channels of theta (the released code). False is the paper's
                equation to the letter.
            temperature: for "disentangled", what divides the logits of the pairs; 0.05 is DNL's.
            subsample: "embeddings" max-pools after phi and g, with kernel and stride 2 in space
                (Section 3.3); "input" pools x before them (the released code); "none" does not
                pool. A spatial dimension of size 1 is left alone by these. "pyramid" averages phi
                and g over 1, 3, 6 and 8 bins in each spatial dimension: 110 keys for an image of
                any size (ANN). m is pooled as phi is. The keys of the plain Gaussian, which has no
                phi, are the pooled x. Time (dims=3) is never pooled.
            norm: normalisation after W_z, as Detectron2's ``get_norm`` takes it: "BN", "SyncBN",
                "FrozenBN", "GN", "LN", "" or a callable from channels to a module.
            zero_init: start as the identity, with the weights of ``zero_init_layer`` at zero.
            zero_init_layer: "norm" (its scale gamma: the paper) or "out" (W_z). Where the norm has
                no trainable scale ("", "FrozenBN") it is always W_z, since with both at zero, or
                a frozen zero, the block could never learn. From scratch, "out" in front of batch
                norm learns much sooner (docs/STUDY.md).
            use_act_checkpoint: in training, keep only x, and compute the embeddings and y again in
                the backward pass: less memory for more time.
            key_channels: channels of the features that phi, g and m are made of, where these are
                others than x (see :meth:`forward`); None for C.

        Raises:
            ValueError: an argument is not among the legal values, C // reduction is 0, or the plain
                Gaussian, which compares x itself with its keys, is given other key channels.
        """
        super().__init__(in_channels, dims=dims, pairwise=pairwise, subsample=subsample)
        check_choice("pairwise", pairwise, PAIRWISE)
        check_choice("subsample", subsample, SUBSAMPLE)
        check_choice("zero_init_layer", zero_init_layer, ZERO_INIT_LAYERS)
        if not isinstance(reduction, int) or not 1 <= reduction <= in_channels:
            raise ArgumentError(
                "reduction",
                f"is {reduction!r}, but must be an integer from 1 to in_channels={in_channels}",
            )
        if isinstance(temperature, bool) or not temperature > 0:
            raise ArgumentError("temperature", f"is {temperature!r}, but must be a number above 0")
        self.key_channels = in_channels if key_channels is None else key_channels
        has_embeddings = PAIRWISE[pairwise].has_embeddings
        if not has_embeddings and self.key_channels != in_channels:
            raise ValueError(
                f"key_channels is {key_channels}, but the plain Gaussian, which has no phi, needs "
                f"as many as in_channels={in_channels}"
            )
        inner_channels = in_channels // reduction
        self.temperature = float(temperature)
        self.use_act_checkpoint = use_act_checkpoint

        conv: Any = CONV[dims]
        self.theta: Any = None
        self.phi: Any = None
        if has_embeddings:
            self.theta = conv(in_channels, inner_channels, kernel_size=1)
            self.phi = conv(self.key_channels, inner_channels, kernel_size=1)
        self.g = conv(self.key_channels, inner_channels, kernel_size=1)
        self.concat: Any = None
        self.unary: Any = None
        if pairwise == "concatenation":
            self.concat = conv(2 * inner_channels, 1, kernel_size=1, bias=False)
        if pairwise == "disentangled":
            self.unary = conv(self.key_channels, 1, kernel_size=1)
        self.out = conv(inner_channels, in_channels, kernel_size=1)
        self.norm = build_norm(norm, in_channels)
        # Detectron2's norms are made for images; they can't tell the positions of a sequence or
        # a video from those of an image one pixel wide.
        self._norm_as_image = dims != 2 and isinstance(norm, str)

        embedding_channels = inner_channels if has_embeddings else in_channels
        self.logit_scale = embedding_channels**-0.5 if scale else 1.0
        self._init_weights()
        if zero_init:
            make_identity(zero_init_layer, self.norm, self.out)

    def _init_weights(self) -> None:
        for module in self.children():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, keys: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """
        Args:
            x: (B, C, *grid), floating point; grid is L, H x W or T x H x W. B may be 0.
            keys: (B, key_channels, *any grid), same dtype: what phi, g and m are made of, such as
                the output of an earlier stage (ANN's AFNB); None for x.

        Returns:
            z, same shape and dtype as x. (In training, batch norm itself needs more than one
            position in the batch: PyTorch refuses a single one of a 1 x 1 grid.)

        Raises:
            ValueError: x or keys have another number of dimensions or channels than the block.
        """
        keys = x if keys is None else keys
        if not torch.jit.is_scripting():
            self._check_input(x)
            self._check_keys(x, keys)
        # No name is kept for what is in between: in inference it is freed as soon as it is used.
        return x + saturated(self._normalize(self._transform(x, keys)), x.dtype)

    def attention(
        self, x: Tensor, positions: Tensor | Sequence, keys: Tensor | None = None
    ) -> Tensor:
        """
        What some positions attend to: the weights f(x_i, x_j) / C(x) of Eq. 1. Memory grows with
        the number of chosen positions only.

        Args:
            x: (B, C, *grid) as in :meth:`forward`.
            positions: the query positions, the same for each of the batch: integers (Q,), indices
                into the flattened grid, or (Q, dims), coordinates in the order of the grid (row,
                column for images).
            keys: as in :meth:`forward`.

        Returns:
            (B, Q, *key grid), float32 for half precision x. The key grid is that of x or of keys,
            halved in space by ``subsample``; for "pyramid" it is (110,) in 2-D, see
            :func:`nl_detectron.layers.subsampling.pyramid_pool`. The weights of the Gaussians sum
            to 1 over it, those of "disentangled" to 2; those of the others need not be positive or
            bounded.

        Raises:
            ValueError: x or keys do not fit the block, or positions have the wrong shape or lie
                outside.
        """
        keys = x if keys is None else keys
        self._check_input(x)
        self._check_keys(x, keys)
        queries = flat_positions(x)[:, flat_index(positions, x)]
        theta = accumulable(self._embed_queries(queries))
        phi, m = self._embed_keys(self._pool_input(keys))
        key_grid = phi.shape[2:]
        if m is not None:  # theta is linear: the mean of theta is theta of the mean
            mean = accumulable(flat_positions(x)).mean(1, keepdim=True).to(x.dtype)
            theta = theta - accumulable(self._embed_queries(mean))
            m = accumulable(m)
        with no_autocast(x):
            return self._weights(theta, accumulable(flat_positions(phi)), m).unflatten(2, key_grid)

    def values(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """
        What each key adds to z_i for each unit of its weight, in inference: D W_z g_j, with D the
        diagonal matrix by which the norm multiplies, gamma / sigma of batch norm. The weights of
        :meth:`attention` times these, summed over the keys, are all that the block adds to x, but
        for the norm of W_z's bias. Of "GN" and "LN", whose sigma depends on the input, D is gamma.

        Args:
            x: (B, C, *grid) as in :meth:`forward`.
            keys: as in :meth:`forward`.

        Returns:
            (B, C, *key grid), float32 for half precision x. For "pyramid" on the grid of x or of
            keys itself: the weight of a bin, spread over its cells by
            :func:`nl_detectron.layers.spread_over_bins`, gives the same sum.

        Raises:
            ValueError: x or keys do not fit the block.
        """
        keys = x if keys is None else keys
        self._check_input(x)
        self._check_keys(x, keys)
        g = self.g(self._pool_input(keys))
        g = accumulable(max_pool(g) if self.subsample == "embeddings" else g)
        scale = inference_scale(self.norm)
        if scale is None:
            scale = getattr(self.norm, "weight", None)
        weight = self.out.weight.to(g.dtype)
        if scale is not None:
            weight = scale.to(g.dtype).view(-1, 1, *[1] * self.dims) * weight
        with no_autocast(x):
            return _CONVOLVE[self.dims](g, weight)

    def _embed_queries(self, x: Tensor) -> Tensor:
        """theta, (B, Q, d), of some positions (B, Q, C)."""
        if self.theta is None:
            return x
        return functional.linear(x, self.theta.weight.flatten(1), self.theta.bias)

    def _check_keys(self, x: Tensor, keys: Tensor) -> None:
        sizes = keys.dim(), keys.shape[0], keys.shape[1]
        if sizes != (x.dim(), x.shape[0], self.key_channels):
            raise ValueError(
                f"keys of shape {tuple(keys.shape)}: this block needs ({x.shape[0]}, "
                f"{self.key_channels}" + ", size" * self.dims + ")"
            )

    def _transform(self, x: Tensor, keys: Tensor) -> Tensor:
        """W_z y before the norm, (B, C, *grid); computed again in the backward pass if asked to."""
        if torch.jit.is_scripting():
            return self._project(x, keys)
        if self.use_act_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(self._project, x, keys, use_reentrant=False)
        return self._project(x, keys)

    def _project(self, x: Tensor, keys: Tensor) -> Tensor:
        y = self._average(x, keys)
        if torch.jit.is_scripting():
            return self.out(y)
        if y.dtype == torch.float32 and self.out.weight.dtype == torch.float16:
            # y was kept in float32 because it may not fit (see pairwise.py); nor may W_z y.
            weight, bias = self.out.weight.float(), self.out.bias.float()
            return saturated(_CONVOLVE[self.dims](y, weight, bias), torch.float16)
        # Autocast, which would take such a y back to float16, has nothing to do for a y that has
        # the weights' dtype.
        with no_autocast(y) if y.dtype == self.out.weight.dtype else nullcontext():
            return self.out(y)

    def _average(self, x: Tensor, keys: Tensor) -> Tensor:
        """y, (B, c, *grid)."""
        keys = self._pool_input(keys)
        g = self.g(keys)
        theta = flat_positions(x if self.theta is None else self.theta(x))
        phi, m = self._embed_keys(keys)
        phi, g = flat_positions(phi), flat_positions(self._subsample(g))
        if torch.jit.is_scripting():
            y = self._operate(theta, phi, m, g)
        else:
            with no_autocast(x):  # the operation chooses its precision itself
                y = self._operate(theta, phi, m, g)
        return y.transpose(1, 2).unflatten(2, x.shape[2:])

    def _operate(self, theta: Tensor, phi: Tensor, m: Optional[Tensor], g: Tensor) -> Tensor:  # noqa: UP045
        """y, (B, N_q, c), from (B, N_q, d), (B, N_k, d), (B, N_k) and (B, N_k, c)."""
        if m is not None:
            return disentangled_pairwise(theta, phi, m, g, self.logit_scale / self.temperature)
        if self.concat is not None:
            a, b = self._concat_terms(theta, phi)
            return concatenation_pairwise(a, b, g)
        if self.pairwise == "dot_product":
            return dot_product_pairwise(theta, phi, g)
        return softmax_pairwise(theta, phi, g, self.logit_scale)

    def _weights(self, theta: Tensor, phi: Tensor, m: Tensor | None) -> Tensor:
        """f / C, (B, N_q, N_k), from (B, N_q, d), (B, N_k, d) and (B, N_k)."""
        if m is not None:
            return disentangled_weights(theta, phi, m, self.logit_scale / self.temperature)
        if self.concat is not None:
            return concatenation_weights(*self._concat_terms(theta, phi))
        if self.pairwise == "dot_product":
            return dot_product_weights(theta, phi)
        return softmax_weights(theta, phi, self.logit_scale)

    def _pool_input(self, keys: Tensor) -> Tensor:
        """What phi, m and g are given."""
        return max_pool(keys) if self.subsample == "input" else keys

    def _embed_keys(self, keys: Tensor) -> tuple[Tensor, Optional[Tensor]]:  # noqa: UP045
        """phi (B, d, *key grid), and m (B, N_k) if there is one."""
        phi = self._subsample(keys if self.phi is None else self.phi(keys))
        m: Optional[Tensor] = None  # noqa: UP045
        if self.unary is not None:
            m = self._subsample(self.unary(keys)).flatten(1)
        return phi, m

    def _subsample(self, x: Tensor) -> Tensor:
        """What is done after phi, m and g."""
        if self.subsample == "embeddings":
            return max_pool(x)
        return pyramid_pool(x) if self.subsample == "pyramid" else x

    def _concat_terms(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """w_theta^T theta_i, (B, N_q), and w_phi^T phi_j, (B, N_k); float32 for half precision."""
        theta, phi = accumulable(theta), accumulable(phi)
        w_theta, w_phi = self.concat.weight.to(theta.dtype).view(-1, 1).chunk(2)
        return (theta @ w_theta).squeeze(2), (phi @ w_phi).squeeze(2)

    def _normalize(self, z: Tensor) -> Tensor:
        if self.norm is None:
            return z
        if self._norm_as_image:
            return self.norm(z.flatten(2).unsqueeze(3)).reshape(z.shape)
        return self.norm(z)
