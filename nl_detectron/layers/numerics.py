"""Keeping the digits that half precision, and float32 over many positions, would lose."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Products are summed over at most so many positions at a time.
MAX_SUMMED = 4096


def accumulable(x: Tensor) -> Tensor:
    """
    Args:
        x: any tensor.

    Returns:
        x, in float32 if it is float16 or bfloat16.
    """
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Args:
        x: floating point.
        dtype: a floating point dtype.

    Returns:
        x in this dtype; what is too large for float16 is its largest number there.
    """
    if dtype == torch.float16 and x.dtype != dtype:
        x = x.clamp(-65504.0, 65504.0)
    return x.to(dtype)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """
    Keep autocast from lowering the precision of what is computed from x.

    Args:
        x: any tensor; its device counts.

    Returns:
        A context manager.
    """
    # Shapes are all that the meta device computes; it has no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def product(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """
    A matrix product that keeps the digits of float32, whatever the precision of what is multiplied.

    Args:
        x: (B, n, N), floating point.
        y: (B, N, m), same dtype.
        out: (B, n, m), to be overwritten.

    Returns:
        x y, (B, n, m), float32 for half precision. Of half precision there are no gradients.
    """
    if accumulable(x[:0]).dtype == x.dtype:
        return torch.bmm(x, y, out=out)
    if x.is_cuda:  # the tensor cores do it
        return torch.bmm(x, y, out_dtype=torch.float32, out=out)
    return torch.bmm(x.float(), y.float(), out=out)


def sum_of_products(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """
    A matrix product, a part of N at a time: for few channels the kernels of libraries add up
    float32 in a row.

    Args:
        x: (B, n, N), floating point.
        y: (B, N, m), same dtype.
        out: (B, n, m), to be overwritten; there are no gradients then.

    Returns:
        As :func:`product`.
    """
    first, *rest = zip(x.split(MAX_SUMMED, 2), y.split(MAX_SUMMED, 1))
    total = product(*first, out=out)
    for x_part, y_part in rest:
        total = torch.add(total, product(x_part, y_part), out=out)
    return total
