"""A Python file's assignments, and those of the files that it takes in, read as literals and never executed."""

from __future__ import annotations

import ast
import os
import warnings
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from nanostudy.errors import UsageError
from nanostudy.interop.literals import Code, Value, literal_or_code, source
from nanostudy.reading import read_text

LARGEST_FILE = 2**20  # bytes
MOST_FILES = 100
Names = ChainMap[str, Value | Code]  # those that a file sets, over those that it knows from elsewhere
SETTERS = ("exec", "eval", "globals", "locals", "vars")  # calls that can set a name without naming it


class Assignments:
    """Reads files of assignments. `folders` are those from which Python would find other files, in order."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(dict.fromkeys(folders))
        self.files: list[Path] = []  # that were read

    def read(self, path: Path, known: Mapping[str, Value]) -> dict[str, Value | Code]:
        """Names and values in the order of the file. A value may use arithmetic, f-strings, `known` names, and names before it.

        `from config.base import *` and `exec(open('config/base.py').read())` read that file in the same way. Imports, functions
        and classes give names alone, and print gives none. Raises UsageError at any other code.
        """
        own: dict[str, Value | Code] = {}
        self._read(path, ChainMap(own, {**known}), ())
        return own

    def _read(self, path: Path, names: Names, readers: tuple[Path, ...]) -> None:
        self.files.append(path)
        if path.resolve() in readers:
            raise UsageError(f"{path} takes in itself, by way of {', '.join(map(str, self.files))}.")
        if len(self.files) > MOST_FILES:
            raise UsageError(f"{self.files[0]} takes in more than {MOST_FILES} files, {path} the last of them.")
        for statement in _statements(path):
            self._do(path, statement, names, (*readers, path.resolve()))

    def _do(self, path: Path, statement: ast.stmt, names: Names, readers: tuple[Path, ...]) -> None:
        match statement:
            case ast.Expr(
                ast.Call(ast.Name("exec"), [ast.Call(ast.Attribute(ast.Call(opened, [file, *_]), "read"), [])])
            ) if source(opened) == "open":
                self._read(self._opened(path, statement, file, names), names, readers)
                return
        if any(_sets_names(node) for node in ast.walk(statement)):
            _refuse(path, statement)
        match statement:
            case ast.Pass() | ast.Expr(ast.Constant() | ast.Call(ast.Name("print"))):
                pass
            case ast.Import():
                for alias in statement.names:
                    names[alias.asname or alias.name.partition(".")[0]] = _definition(statement)
            case ast.ImportFrom():
                names |= self._imported(path, statement, readers)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names[statement.name] = _definition(statement)
            case ast.Assign(targets, value) if all(isinstance(target, ast.Name) for target in targets):
                names |= dict.fromkeys(map(ast.unparse, targets), literal_or_code(value, names))
            case ast.AnnAssign(target=ast.Name(name), value=ast.expr() as value):
                names[name] = literal_or_code(value, names)
            case ast.AugAssign(target=ast.Name(name), op=operation, value=value):
                sum_ = ast.copy_location(ast.BinOp(ast.Name(name, ast.Load()), operation, value), statement)
                names[name] = literal_or_code(sum_, names)
            case _:
                _refuse(path, statement)

    def _imported(self, path: Path, statement: ast.ImportFrom, readers: tuple[Path, ...]) -> dict[str, Value | Code]:
        """What a module gives; it does not see the names of the file that imports it."""
        file = Path(*(statement.module or "").split("."))
        module = None if statement.level else self._found(f"{file}.py")
        everything = statement.names[0].name == "*"
        if module is None and not everything:
            return {alias.asname or alias.name: _definition(statement) for alias in statement.names}
        if module is None:
            raise UsageError(
                f"{path}, line {statement.lineno}: `{source(statement)}` may set anything, and its file is in none of: {self._places()}. "
                "Write the values themselves, or start where the file is found."
            )
        inner: Names = ChainMap({})
        self._read(module, inner, readers)
        if everything and "__all__" not in inner:
            return {name: value for name, value in inner.items() if not name.startswith("_")}
        missing = [alias.name for alias in statement.names if alias.name not in inner]
        if missing:
            _refuse(path, statement, f" ({module} does not say what {missing[0]} is)")
        return {alias.asname or alias.name: inner[alias.name] for alias in statement.names}

    def _found(self, name: str) -> Path | None:
        return next((folder / name for folder in self.folders if os.path.isfile(folder / name)), None)

    def _places(self) -> str:
        return ", ".join(map(str, self.folders))

    def _opened(self, path: Path, statement: ast.stmt, file: ast.expr, names: Names) -> Path:
        name = literal_or_code(file, names)
        if not isinstance(name, str):
            _refuse(path, statement)
        existing = self._found(name)
        if existing is None:
            _refuse(path, statement, f" (there is no file {name} in {self._places()})")
        return existing


def _statements(path: Path) -> list[ast.stmt]:
    try:
        with warnings.catch_warnings(action="ignore"):  # about its style
            return ast.parse(read_text(path, LARGEST_FILE), str(path)).body
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}.") from None
    except SyntaxError as problem:
        raise UsageError(f"{path} is not Python, in line {problem.lineno}: {problem.msg}.") from None
    except (ValueError, RecursionError, MemoryError) as problem:
        raise UsageError(f"{path} cannot be read: {problem}.") from None


def _sets_names(node: ast.AST) -> bool:
    return isinstance(node, ast.NamedExpr | ast.Global) or (isinstance(node, ast.Name) and node.id in SETTERS)


def _definition(statement: ast.stmt) -> Code:
    return Code(source(statement).partition("\n")[0], statement.lineno, definition=True)


def _refuse(path: Path, statement: ast.stmt, why: str = "") -> NoReturn:
    raise UsageError(
        f"{path}, line {statement.lineno}: `{source(statement).splitlines()[0]:.60}` is code{why}. A configuration is read and "
        "never executed: only lines of the form `setting = value` are understood. Write the value itself."
    )
