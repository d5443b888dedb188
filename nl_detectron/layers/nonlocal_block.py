"""The non-local block of "Non-local Neural Networks" (https://arxiv.org/abs/1711.07971)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nl_detectron.layers import children, folding
from nl_detectron.layers.attention_block import CONV, AttentionBlock, flat_index, flat_positions
from nl_detectron.layers.children import evaluating, float_dtype, in_full_precision
from nl_detectron.layers.norm import ZERO_INIT_LAYERS, Norm, build_norm, make_identity, scaled
from nl_detectron.layers.numerics import accumulable, is_half, no_autocast, ranged, saturated
from nl_detectron.layers.pairwise import PAIRWISE, whitened
from nl_detectron.layers.subsampling import SUBSAMPLE, Pool, keys_and_pool, max_pool
from nl_detectron.validation import ArgumentError, check_choice


class NonLocalBlock(AttentionBlock):
    """
    z = W_z y + x with the non-local operation y of Eq. 1 (Eq. 6 and Figure 2 of the paper), as a
    Detectron2 block: input and output have the same shape, so that it fits between any two others.

    The block's children are the paper's ``theta``, ``phi``, ``g`` (1x1 convolutions to
    ``in_channels // reduction`` channels; the plain Gaussian has neither theta nor phi), for the
    concatenation ``concat`` (w_f, whose first half belongs to theta), for "disentangled" ``unary``
    (m, to one channel), ``out`` (W_z) and ``norm``.
    Convolutions start at N(0, 0.01^2) with zero bias, as in the released code; w_f has no bias.
    Children are called as modules, ``concat`` on unit vectors, from which w_f is read off. Only
    where all are plain convolutions their weights are read, if that is cheaper: see folding.py.
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
    ) -> None:
        """
        Make a block with random weights that is the identity, if ``zero_init`` is left at True.

        Args:
            in_channels: C, channels of input and output.
            dims: 1 for sequences (B, C, L), 2 for images (B, C, H, W), 3 for video (B, C, T, H, W).
            pairwise: the pairwise function f of Section 3.2: "gaussian", "embedded_gaussian",
                "dot_product" or "concatenation"; or "disentangled", see
                :func:`nl_detectron.layers.disentangled_pairwise`.
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

        Raises:
            ValueError: an argument is not among the legal values, or C // reduction is 0.
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
        self.temperature = float(temperature)
        self.use_act_checkpoint = use_act_checkpoint

        conv, inner_channels = CONV[dims], in_channels // reduction
        self.inner_channels = inner_channels
        self.theta: nn.Module | None = None
        self.phi: nn.Module | None = None
        if has_embeddings := PAIRWISE[pairwise].has_embeddings:
            self.theta = conv(in_channels, inner_channels, kernel_size=1)
            self.phi = conv(in_channels, inner_channels, kernel_size=1)
        self.g = conv(in_channels, inner_channels, kernel_size=1)
        self.concat: nn.Module | None = None
        self.unary: nn.Module | None = None
        if pairwise == "concatenation":
            self.concat = conv(2 * inner_channels, 1, kernel_size=1, bias=False)
        if pairwise == "disentangled":
            self.unary = conv(in_channels, 1, kernel_size=1)
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

    def forward(self, x: Tensor) -> Tensor:
        """
        Add to each position what it gathers from all.

        Args:
            x: (B, C, *grid), floating point; grid is L, H x W or T x H x W. B may be 0.

        Returns:
            z, same shape and dtype as x. (In training, batch norm itself needs more than one
            position in the batch: PyTorch refuses a single one of a 1 x 1 grid.)

        Raises:
            ValueError: x has another number of dimensions or channels than the block.
        """
        self._check_input(x)
        # No name is kept for what is in between: in inference it is freed as soon as it is used.
        return x + saturated(self._normalize(self._transform(x)), x.dtype)

    def attention(self, x: Tensor, positions: Tensor | Sequence) -> Tensor:
        """
        What some positions attend to: the weights f(x_i, x_j) / C(x) of Eq. 1. Memory grows with
        the number of chosen positions only.

        Args:
            x: (B, C, *grid) as in :meth:`forward`.
            positions: the query positions, the same for each of the batch: integers (Q,), indices
                into the flattened grid, or (Q, dims), coordinates in the order of the grid (row,
                column for images).

        Returns:
            (B, Q, *key grid), float32 for half precision x. The key grid is that of x, halved in
            space by ``subsample``; for "pyramid" it is (110,) in 2-D, the bins of
            :func:`nl_detectron.layers.spread_over_bins`. The weights of the Gaussians sum to 1
            over it, those of "disentangled" to 2; those of the others need not be positive or
            bounded.

        Raises:
            ValueError: x does not fit the block, or positions have the wrong shape or lie outside.
        """
        self._check_input(x)
        index = flat_index(positions, x)
        keys, pool = keys_and_pool(x, self.subsample, self._is_plain())
        key_grid = pool(keys[:, :1]).shape[2:]
        queries, by_key, *m = map(accumulable, self._embed(x, keys, pool))
        with no_autocast(x):
            if self.unary is not None:
                queries = whitened(queries)
            queries = queries[:, index]
            if self.concat is None:
                pairs = queries @ by_key.mT
            else:
                pairs = queries.unsqueeze(2) + by_key.unsqueeze(1)
            weights = PAIRWISE[self.pairwise].weights(pairs, *m, *self._factors())
        weights = weights.unflatten(2, key_grid)
        return weights.squeeze(-1) if self.subsample == "pyramid" else weights

    def values(self, x: Tensor) -> Tensor:
        """
        What each key adds to z_i for each unit of its weight, in inference: D W_z g_j, with D the
        diagonal matrix by which the norm multiplies, gamma / sigma of batch norm. The weights of
        :meth:`attention` times these, summed over the keys, are all that the block adds to x, but
        for the norm of W_z's bias. Of "GN" and "LN", whose sigma depends on the input, D is gamma.

        Args:
            x: (B, C, *grid) as in :meth:`forward`.

        Returns:
            (B, C, *key grid), float32 for half precision x. For "pyramid" on the grid of x itself:
            the weight of a bin, spread over its cells by
            :func:`nl_detectron.layers.spread_over_bins`, gives the same sum.

        Raises:
            ValueError: x does not fit the block.
        """
        self._check_input(x)
        with evaluating(self):
            g = self.g(max_pool(x) if self.subsample == "input" else x)
            g = accumulable(max_pool(g) if self.subsample == "embeddings" else g)
            zero = g.new_zeros(1, g.shape[1], *[1] * self.dims)
            z = in_full_precision(self.out, g) - in_full_precision(self.out, zero)
            if self._norm_as_image:
                return scaled(z.flatten(2).unsqueeze(3), self.norm).reshape(z.shape)
            return scaled(z, self.norm)

    def _transform(self, x: Tensor) -> Tensor:
        """W_z y before the norm, (B, C, *grid); computed again in the backward pass if asked to."""
        if self.use_act_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(self._project, x, use_reentrant=False)
        return self._project(x)

    def _project(self, x: Tensor) -> Tensor:
        keys, pool = keys_and_pool(x, self.subsample, self._is_plain())
        g, function = pool(self.g(keys)), PAIRWISE[self.pairwise]
        fold = None
        if self._is_plain():
            has_fixed_keys = self.subsample == "pyramid" and self.dims < 3
            fold = folding.choose_fold(function, x.flatten(2), g.flatten(2), has_fixed_keys)
        if fold == folding.KEYS:
            z = self._sum_over_keys(x, keys, pool, g)
        else:
            embedded = self._embed(x, keys, pool)
            g = flat_positions(g)
            with no_autocast(x):  # the operation chooses its precision itself
                if fold == folding.CONTEXT:
                    z = folding.sum_by_context(
                        embedded, g, children.weight_and_bias(self.out, accumulable(g))
                    )
                else:
                    z = function.average(*embedded, g, *self._factors()).transpose(1, 2)
        z = z.unflatten(2, x.shape[2:])
        if fold is None:
            # What is kept in float32 (see pairwise.py) may not fit float16, nor may W_z y.
            z = self.out(z) if is_half(z) else in_full_precision(self.out, z)
        return saturated(z, torch.float16) if float_dtype(self.out) == torch.float16 else z

    def _sum_over_keys(self, x: Tensor, keys: Tensor, pool: Pool, g: Tensor) -> Tensor:
        """W_z y, (B, C, N_q), from few keys: see :func:`sum_over_keys`."""
        function, g = PAIRWISE[self.pairwise], ranged(flat_positions(g))
        if self.concat is not None:
            embedded, theta = self._embed(x, keys, pool), None
        else:
            embedded = self._compared(keys, pool)
            theta = None if self.theta is None else children.weight_and_bias(self.theta, g)
        out = children.weight_and_bias(self.out, g)
        with no_autocast(x):
            embedded = tuple(ranged(t) for t in embedded)
            x = x.flatten(2).to(g.dtype)
            return folding.sum_over_keys(function, x, embedded, g, theta, out, self._factors())

    def _is_plain(self) -> bool:
        """Is all that is known of the convolutions in their weights?"""
        return all(children.is_plain(child) for child in self.children() if child is not self.norm)

    def _compared(self, keys: Tensor, pool: Pool) -> tuple[Tensor, ...]:
        """phi (B, N_k, d), of "disentangled" m (B, N_k), too."""
        phi = flat_positions(pool(keys if self.phi is None else self.phi(keys)))
        return (phi,) if self.unary is None else (phi, pool(self.unary(keys)).flatten(1))

    def _embed(self, x: Tensor, keys: Tensor, pool: Pool) -> tuple[Tensor, ...]:
        """
        What the pairwise function compares: theta (B, N_q, d) and phi (B, N_k, d); of
        "disentangled" m (B, N_k), too; of the concatenation a and b.
        """
        if self.concat is not None:
            return self._concat_terms(x, keys, pool)
        theta = flat_positions(x if self.theta is None else self.theta(x))
        return theta, *self._compared(keys, pool)

    def _concat_terms(self, x: Tensor, keys: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        """w_theta^T theta_i, (B, N_q), and w_phi^T phi_j, (B, N_k); float32 for half precision."""
        theta, phi, concat = map(self.get_submodule, ("theta", "phi", "concat"))
        w_f, bias = children.matrix_and_bias(
            concat, 2 * self.inner_channels, self.dims, accumulable(x)
        )

        w_theta, w_phi = w_f.chunk(2)
        a = folding.linear_term(theta, x, w_theta, nn.Identity(), self._is_plain())
        return a + bias, folding.linear_term(phi, keys, w_phi, pool, self._is_plain())

    def _factors(self) -> tuple[float, ...]:
        """What the pairwise function takes besides tensors: by what its logits are multiplied."""
        if not PAIRWISE[self.pairwise].is_scaled:
            return ()
        return (self.logit_scale / (1.0 if self.unary is None else self.temperature),)

    def _normalize(self, z: Tensor) -> Tensor:
        if self.norm is None:
            return z
        if self._norm_as_image:
            return self.norm(z.flatten(2).unsqueeze(3)).reshape(z.shape)
        return self.norm(z)
