"""A Python file's assignments, read as literals and never executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanostudy.errors import UsageError

Value = bool | int | float | str | None

LARGEST_FILE = 2**20  # bytes
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


@dataclass(frozen=True)
class Code:
    """A value that is not a literal: a call, an attribute, an imported name."""

    text: str
    line: int


def read_assignments(path: Path, known: Mapping[str, Value]) -> dict[str, Value | Code]:
    """Names and values in the order of the file. A value may use arithmetic, `known` names and names assigned before it.

    Raises UsageError at anything that is not an assignment, an import or a comment.
    """
    names: dict[str, Value | Code] = {}
    for statement in _statements(path):
        for name, value in _assignments(path, statement):
            names[name] = value if isinstance(value, Code) else _literal_or_code(value, {**known, **names})
    return names


def _literal_or_code(node: ast.expr, names: Mapping[str, Value | Code]) -> Value | Code:
    try:
        return _literal(node, names)
    except (ArithmeticError, ValueError):
        return Code(ast.unparse(node), node.lineno)
    except RecursionError:
        return Code("a very long expression", node.lineno)


def _statements(path: Path) -> list[ast.stmt]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UsageError(f"{path} is no configuration: it is larger than {LARGEST_FILE:,} bytes.")
        return ast.parse(path.read_text(encoding="utf-8-sig"), str(path)).body
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}.") from None
    except SyntaxError as problem:
        raise UsageError(f"{path} is not Python, in line {problem.lineno}: {problem.msg}.") from None
    except (ValueError, RecursionError, MemoryError) as problem:
        raise UsageError(f"{path} cannot be read: {problem}.") from None


def _assignments(path: Path, statement: ast.stmt) -> Iterator[tuple[str, ast.expr | Code]]:
    match statement:
        case ast.Expr(value=ast.Constant()):  # a text that stands alone is a comment
            pass
        case ast.Import() | ast.ImportFrom():
            for alias in statement.names:
                code = Code(ast.unparse(statement), statement.lineno)
                yield (alias.asname or alias.name).partition(".")[0], code
        case ast.Assign(targets, value) if all(isinstance(target, ast.Name) for target in targets):
            yield from ((ast.unparse(target), value) for target in targets)
        case ast.AnnAssign(target=ast.Name(name), value=ast.expr() as value):
            yield name, value
        case ast.AugAssign(target=ast.Name(name), op=operation, value=value):
            yield name, ast.copy_location(ast.BinOp(ast.Name(name, ast.Load()), operation, value), statement)
        case _:
            raise UsageError(
                f"{path}, line {statement.lineno}: `{ast.unparse(statement).splitlines()[0]:.60}` is code. A configuration "
                "is read and never executed: only lines of the form `setting = value` are understood. Write the value itself."
            )


def _literal(node: ast.expr, names: Mapping[str, Value | Code]) -> Value:
    """Raises ValueError or ArithmeticError where the expression is not a literal, or gets too large."""
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
    raise ValueError


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
