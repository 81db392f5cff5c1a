"""Python expressions that are computed from literals alone. Nothing is executed."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Value = bool | int | float | str | None

LARGEST_NUMBER = 2**63
LARGEST_EXPONENT = 64
LONGEST_TEXT = 10_000
OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
CALLS: dict[str, Callable[..., Any]] = {call.__name__: call for call in (str, int, float, bool, round, abs, min, max)}
CONVERSIONS: dict[int, Callable[[object], str]] = {ord("s"): str, ord("r"): repr, ord("a"): ascii}
# at most three digits, so that a width makes no long text
FORMAT = re.compile(r"(.?[<>=^])?[-+ ]?#?\d{0,3}[_,]?(\.\d{1,3})?[a-zA-Z%]?")


@dataclass(frozen=True)
class Code:
    """What is not computed from literals: a call, an attribute, an imported name."""

    text: str
    line: int
    definition: bool = False  # an import, a function or a class: it gives a name, and most often no setting


def literal_or_code(node: ast.expr, names: Mapping[str, Value | Code]) -> Value | Code:
    """The value of an expression, in which `names` stand for theirs."""
    try:
        return _literal(node, names)
    except (ArithmeticError, ValueError, TypeError, RecursionError):
        return Code(source(node), node.lineno)


def source(node: ast.AST) -> str:
    try:
        return ast.unparse(node)
    except RecursionError:
        return "..."


def _literal(node: ast.expr, names: Mapping[str, Value | Code]) -> Value:
    """Raises ValueError, TypeError or ArithmeticError where the expression is not a literal, or gets too large."""
    match node:
        case ast.Constant(bool() | int() | float() | str() | None as value):
            return _bounded(value)
        case ast.Name(name) if name in names and not isinstance(known := names[name], Code):
            return known
        case ast.UnaryOp(ast.USub(), operand):
            return -_number(_literal(operand, names))
        case ast.UnaryOp(ast.UAdd(), operand):
            return _number(_literal(operand, names))
        case ast.BinOp() if type(node.op) in OPERATIONS:
            left, right = _literal(node.left, names), _literal(node.right, names)
            if isinstance(left, str) and isinstance(right, str) and isinstance(node.op, ast.Add):
                return _bounded(left + right)
            if isinstance(node.op, ast.Pow) and abs(_number(right)) > LARGEST_EXPONENT:
                raise ValueError
            return _bounded(OPERATIONS[type(node.op)](_number(left), _number(right)))
        case ast.Call(ast.Name(name), args, []) if name in CALLS and name not in names:
            return _bounded(CALLS[name](*(_literal(argument, names) for argument in args)))
        case ast.JoinedStr(parts):
            return _bounded("".join(_formatted(part, names) for part in parts))
    raise ValueError


def _formatted(part: ast.expr, names: Mapping[str, Value | Code]) -> str:
    """One piece of an f-string."""
    if not isinstance(part, ast.FormattedValue):
        return str(_literal(part, names))
    value, form = _literal(part.value, names), str(_literal(part.format_spec, names)) if part.format_spec else ""
    if not FORMAT.fullmatch(form):
        raise ValueError
    return format(CONVERSIONS[part.conversion](value) if part.conversion > 0 else value, form)


def _number(value: Value) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return value


def _bounded(value: object) -> Value:
    if isinstance(value, str) and len(value) <= LONGEST_TEXT:
        return value
    if value is None or (isinstance(value, bool | int | float) and not abs(value) > LARGEST_NUMBER):
        return value
    raise ValueError
