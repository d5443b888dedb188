"""Backward passes that have no derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


def first_order(backward: Backward) -> Backward:
    """
    Let the backward pass of a ``torch.autograd.Function`` that has no derivative of its own raise
    RuntimeError where ``create_graph=True`` asks for one. PyTorch's ``once_differentiable`` is not
    enough: a second ``torch.autograd.grad`` with respect to the inputs silently leaves out what
    goes through it.
    """

    @wraps(backward)
    def without_graph(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph is True, but this non-local block has no second derivative: its "
                "backward pass is written by hand"
            )
        return backward(ctx, *gradients)

    return without_graph
