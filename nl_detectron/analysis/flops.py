"""
What fvcore's FLOP counter has to know to be right for non-local blocks.

fvcore counts a multiply-add as one flop, and only products of matrices and the like: of what the
blocks call, it does not know ``scaled_dot_product_attention``, and without a handle counts it as
nothing. For a ``FlopCountAnalysis`` of your own call :func:`register_flop_handles` once, or give it
:func:`flop_handles`. Work on single elements (the softmax, the sorting and the prefix sums of the
concatenation) is left out, as it is for all that fvcore knows.

fvcore counts what it records. Of folded weights (layers/folding.py) that is what is done at
the size of the input; but the dot product always multiplies phi^T g first, and for a small grid the
block itself takes the cheaper order, and needs less than is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

FlopHandle = Callable[[list[Any], list[Any]], int]
"""From an operator's inputs and outputs (``torch._C.Value``) to its multiply-adds."""

_UNCOUNTED = (
    *("add", "add_", "amax", "amin", "argsort", "clamp", "cumsum", "div", "expand_as", "eye"),
    *("max_pool2d", "mean", "movedim", "mul", "neg", "pad", "rsqrt", "softmax", "sort", "sub"),
    *("sum", "unflatten"),
)
_PADDING = ("aten::pad", "aten::constant_pad_nd")


def flop_handles() -> dict[str, FlopHandle | None]:
    """
    What ``FlopCountAnalysis(...).set_op_handle(**flop_handles())`` takes: handles for the operators
    of non-local blocks that fvcore lacks; None for operators that count as nothing.
    """
    return {
        "aten::scaled_dot_product_attention": _attention_flops,
        **{f"aten::{name}": None for name in _UNCOUNTED},
    }


def register_flop_handles() -> None:
    """
    Add :func:`flop_handles` to what every ``FlopCountAnalysis``, Detectron2's too, knows from the
    start, in the whole process. What is registered already stays.
    """
    try:
        from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS as table
    except ImportError:  # it is private; set_op_handle will always be there
        return
    for name, handle in flop_handles().items():
        table.setdefault(name, handle)


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """
    (B, heads, N_q, d), (B, heads, N_k, d) and (B, heads, N_k, c): N_q N_k (d + c) for each head.
    Channels that are there for the kernel's sake only, padded with zeros, are not counted.
    """
    query, key, value = inputs[:3]
    pairs = prod(_shape(query)[:-1]) * _shape(key)[-2]
    return pairs * (_shape(_unpadded(query))[-1] + _shape(_unpadded(value))[-1])


def _unpadded(value: Any) -> Any:
    node = value.node()
    return next(node.inputs()) if node.kind() in _PADDING else value


def _shape(value: Any) -> list[int]:
    return value.type().sizes()
