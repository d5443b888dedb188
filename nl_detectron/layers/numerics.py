"""Keeping the digits that half precision, and float32 over many positions, would lose."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Products are summed over at most so many positions at a time.
MAX_SUMMED = 4096


def is_half(x: Tensor) -> bool:
    """Is x float16 or bfloat16?"""
    return x.dtype == torch.float16 or x.dtype == torch.bfloat16


def accumulable(x: Tensor) -> Tensor:
    """x, in float32 if it is float16 or bfloat16."""
    return x.float() if is_half(x) else x


def ranged(x: Tensor) -> Tensor:
    """x, in float32 if it is float16, whose range products of embeddings leave."""
    return x.float() if x.dtype == torch.float16 else x


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a floating point dtype; what is too large for float16 is its largest number there."""
    if dtype == torch.float16 and x.dtype != dtype:
        x = x.clamp(-65504.0, 65504.0)
    return x.to(dtype)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast from lowering the precision of what is computed on the device of x."""
    # Shapes are all that the meta device computes; it has no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def sum_of_products(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """
    x (B, n, N) times y (B, N, m), a part of N at a time: for few channels the kernels of libraries
    add up float32 in a row. Without gradients, ``out`` may be given to be overwritten.
    """
    first, *rest = zip(x.split(MAX_SUMMED, 2), y.split(MAX_SUMMED, 1))
    total = torch.bmm(*first, out=out)
    for x_part, y_part in rest:
        total = torch.add(total, torch.bmm(x_part, y_part), out=out)
    return total
