"""
titu1994/keras-non-local-nets: its ``non_local.py``, for sequences, images and videos.

Its convolutions have no names of their own: Keras numbers the layers of a model in the order in
which they are made. A block is four convolutions that follow each other, theta, phi, g and out, of
kernel size 1, without bias and of the sizes that a block has. The plain Gaussian, which has the
last two only, cannot be told from other layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nl_detectron.weights.block import Block
from nl_detectron.weights.conversion import ConversionError
from nl_detectron.weights.family import Family, Part

_KERNEL = re.compile(r"(?P<layer>(?:.*/)?conv(?P<dims>[123])d(?:_(?P<number>\d+))?)/kernel(?::0)?")
_PARTS = ("theta", "phi", "g", "out")


class _KerasFamily(Family):
    def find(self, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
        """As in the base class; blocks are named after the layer of their theta."""
        layers = sorted(
            (match["dims"], int(match["number"] or 0), match["layer"], name)
            for name, tensor in tensors.items()
            if (match := _KERNEL.fullmatch(name))
            and tensor.dim() == int(match["dims"]) + 2
            and name.replace("/kernel", "/bias") not in tensors
        )
        blocks: dict[str, Block] = {}
        while len(layers) >= len(_PARTS):
            (dims, first, prefix, _), *_, last = run = layers[: len(_PARTS)]
            names = [layer[3] for layer in run]
            is_block = last[:2] == (dims, first + 3) and _is_block([tensors[n] for n in names])
            if is_block:
                blocks[prefix] = _block(prefix, {name: tensors[name] for name in names})
            layers = layers[len(_PARTS) if is_block else 1 :]
        return blocks


def _is_block(kernels: list[Tensor]) -> bool:
    """Are these the sizes of theta, phi, g and out, as Keras has them: (*1, channels in, out)?"""
    channels, inner = kernels[0].shape[-2:]
    sizes = [(channels, inner)] * 3 + [(inner, channels)]
    return all(k.shape == (*[1] * (k.dim() - 2), *size) for k, size in zip(kernels, sizes))


def _block(prefix: str, kernels: Mapping[str, Tensor]) -> Block:
    block = Block(prefix, parts=dict(zip(_PARTS, _PARTS)))
    for part, (name, kernel) in zip(_PARTS, kernels.items()):
        block.origins[f"{part}.weight"] = name
        weight = kernel.movedim((-1, -2), (0, 1)).contiguous()
        block.change(f"{part}.weight", weight, "axes as PyTorch's")
    return block


def _from_keras(block: Block) -> None:
    if block.traits.subsample == "none":
        return
    if block.traits.pairwise == "dot_product":
        raise ConversionError("its dot product does not subsample: say subsample='none'")
    if block.dims_in_file > 1:
        raise ConversionError(
            "its compression pools neighbours in the flattened grid, ours in the grid, which is "
            "another thing for images and videos; only compression=1, subsample='none', converts"
        )


FAMILY = _KerasFamily(
    title="keras-non-local-nets",
    parts={part: Part(part) for part in _PARTS},
    scales={"embedded_gaussian": (False,), "dot_product": ()},
    subsample=("none", "embeddings"),
    separator="/",
    no_bias=_PARTS,
    usual={"pairwise": "embedded_gaussian", "subsample": "embeddings"},
    to_ours=_from_keras,
)
