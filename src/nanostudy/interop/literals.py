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
    """What stands in the place of a value and is none: a call, an attribute, an imported name."""

    text: str
    line: int


class _NoLiteral(Exception):
    pass


def read_assignments(path: Path, known: Mapping[str, Value]) -> dict[str, Value | Code]:
    """Names and values in the order of the file: literals, and arithmetic of them and of names that are known or assigned before.

    Raises UsageError at anything that is neither an assignment, an import nor a comment.
    """
    names: dict[str, Value | Code] = {}
    for node in _statements(path):
        for name, value in _assigned(path, node):
            if isinstance(value, ast.expr):
                try:
                    names[name] = evaluate(value, {**known, **names})
                except _NoLiteral:
                    names[name] = Code(ast.unparse(value), node.lineno)
                except RecursionError:
                    names[name] = Code("a very long expression", node.lineno)
            else:
                names[name] = value
    return names


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


def _assigned(path: Path, node: ast.stmt) -> Iterator[tuple[str, ast.expr | Code]]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a text that stands alone is a comment
    if isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            yield (alias.asname or alias.name).partition(".")[0], Code(ast.unparse(node), node.lineno)
        return
    targets: list[ast.expr] = []
    value: ast.expr | None = None
    if isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets, value = [node.target], node.value
    for target in targets or (None,):
        if not isinstance(target, ast.Name) or value is None:
            shown = ast.unparse(node).splitlines()[0]
            raise UsageError(
                f"{path}, line {node.lineno}: `{shown:.60}` is code. A configuration is read and never executed: only "
                "lines of the form `setting = value` are understood. Write the value itself."
            )
        if isinstance(node, ast.AugAssign):
            yield target.id, ast.BinOp(ast.Name(target.id, ast.Load()), node.op, value)
        else:
            yield target.id, value


def evaluate(node: ast.expr, known: Mapping[str, Value | Code]) -> Value:
    """Raises _NoLiteral, also where a number gets too large."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in known:
        value = known[node.id]
        if not isinstance(value, Code):
            return value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _number(evaluate(node.operand, known))
        return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left, right = evaluate(node.left, known), evaluate(node.right, known)
        if isinstance(left, str) and isinstance(right, str) and isinstance(node.op, ast.Add):
            return _bounded(left + right)
        left, right = _number(left), _number(right)
        if isinstance(node.op, ast.Pow) and abs(right) > 64:
            raise _NoLiteral
        try:
            return _bounded(OPERATIONS[type(node.op)](left, right))
        except (ArithmeticError, ValueError):
            raise _NoLiteral from None
    raise _NoLiteral


def _number(value: Value) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _NoLiteral
    return value


def _bounded(value: object) -> Value:
    if isinstance(value, str) and len(value) <= LONGEST_TEXT:
        return value
    if value is None or (isinstance(value, bool | int | float) and not abs(value) > LARGEST_NUMBER):
        return value
    raise _NoLiteral
