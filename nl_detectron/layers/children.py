"""
Calling a block's children where their weights alone would do, in more precision than they have.

A child is never read, only called: what prunes it, reparametrises it, hooks into it, shards it or
stands in its place (LoRA, quantisation) then takes part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from nl_detectron.layers.numerics import accumulable, is_half, no_autocast


def in_full_precision(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` in the float32 or float64 of x: half precision weights are taken as float32."""
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))
    with no_autocast(x):
        if not any(map(is_half, tensors.values())):
            return module(x)
        if torch.jit.is_tracing():  # which functional_call refuses
            return _float_copy(module)(x)
        tensors = {name: accumulable(tensor) for name, tensor in tensors.items()}
        return torch.func.functional_call(module, tensors, (x,))


def _float_copy(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    for part, own in zip(copied.modules(), module.modules()):
        own_tensors = own.named_parameters(recurse=False), own.named_buffers(recurse=False)
        for name, tensor in chain(*own_tensors):
            delattr(part, name)
            setattr(part, name, accumulable(tensor))
    return copied


class Affine(NamedTuple):
    """x (N, channels) to x @ matrix + bias."""

    matrix: Tensor  # (channels, out)
    bias: Tensor  # (out,)


def is_plain(module: nn.Module) -> bool:
    """
    Is it a 1x1 convolution as PyTorch makes it, of which weight and bias tell all? What is pruned,
    parametrised, sharded or adapted has another class or a hook. fvcore's hooks only count.
    """
    hooks = chain(
        *(module._forward_pre_hooks.values(), module._forward_hooks.values()),
        *(module._backward_pre_hooks.values(), module._backward_hooks.values()),
    )
    return (
        type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and cast(Tensor, module.weight)[0, 0].numel() == 1
        and bool(module.groups == 1)
        and "forward" not in vars(module)
        and all(type(hook).__module__.startswith("fvcore.") for hook in hooks)
    )


def weight_and_bias(module: nn.Module, like: Tensor) -> Affine:
    """Of a plain convolution, in the dtype of ``like``."""
    # Not by get_parameter, which refuses what torch.func.functional_call puts there.
    weight, bias = cast(Tensor, module.weight).flatten(1).t(), cast("Tensor | None", module.bias)
    bias = weight.new_zeros(weight.shape[1]) if bias is None else bias
    return Affine(weight.to(like.dtype), bias.to(like.dtype))


def matrix_and_bias(module: nn.Module, channels: int, dims: int, like: Tensor) -> Affine:
    """
    A 1x1 convolution, or an affine module in its place, in the dtype of ``like``: from what it
    makes of unit vectors and of 0.
    """
    vectors = torch.eye(channels + 1, channels, dtype=like.dtype, device=like.device)
    rows = in_full_precision(module, vectors.view(*vectors.shape, *[1] * dims)).flatten(1)
    rows = rows.to(like.dtype)
    return Affine(rows[:-1] - rows[-1], rows[-1])


def float_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating point weight; None without any."""
    dtypes = (tensor.dtype for tensor in chain(module.parameters(), module.buffers()))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode of a module and all in it; afterwards each has its own again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
