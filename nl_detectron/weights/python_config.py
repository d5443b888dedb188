"""Configs that are written in Python, read as data."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

_ON_NUMBERS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Unread(str):
    """The source of an expression that is more than data."""


def read_python_config(text: str) -> dict[str, Any]:
    """
    Read the values that a config's top level assigns: numbers, texts, lists and ``dict(...)`` of
    them, sums and products of numbers, and names that were assigned before. Nothing is run.

    Args:
        text: the config's source.

    Returns:
        The values by their names. Tuples are lists; any other expression is :class:`Unread`.

    Raises:
        ValueError: the text is not Python.
    """
    try:
        statements = ast.parse(text).body
        values: dict[str, Any] = {}
        for statement in statements:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = _value(value, values)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"the config is not Python that can be read: {error}") from error
    return values


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(k, ast.Constant) for k in keys):
            return {key.value: _value(v, names) for key, v in zip(keys, values)}  # type: ignore[union-attr]
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=words) if all(
            word.arg for word in words
        ):
            return {str(word.arg): _value(word.value, names) for word in words}
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            number = _value(operand, names)
            return -number if _is_number(number) else Unread(ast.unparse(node))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ON_NUMBERS:
            numbers = _value(left, names), _value(right, names)
            if all(map(_is_number, numbers)) and not (type(sign) is ast.Div and not numbers[1]):
                return _ON_NUMBERS[type(sign)](*numbers)
    return Unread(ast.unparse(node))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
