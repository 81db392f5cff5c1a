"""YAML as a person means it: mappings, without what YAML 1.1 reads otherwise than it looks. Refusals name the line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from nanostudy.errors import UsageError
from nanostudy.validation import NO_CHARACTER

LARGEST_FILE = 2**20  # bytes
MOST_REPEATED = 100_000  # values that aliases (*name) repeat
PLAIN_NUMBERS = {
    "int": re.compile(r"[-+]?(0|[1-9][0-9_]{0,30})"),  # YAML reads 010 as 8, 1:30 as 90, and 0x10 as 16
    "float": re.compile(
        r"[-+]?(?=\.?[0-9])([0-9][0-9_]*)?\.?[0-9_]*([eE][-+]?[0-9]{1,9})?|[-+]?\.(inf|nan)", re.IGNORECASE
    ),
}
TYPES = ("str", "bool", "null", "map", "seq", "merge")
PREFIX = "tag:yaml.org,2002:"


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The one mapping that a YAML text holds. Raises UsageError."""
    documents = parse_documents(text, source)
    if len(documents) != 1:
        raise UsageError(f"{source} must hold one document, and no line `---` between its settings.")
    return documents[0]


def parse_documents(text: str, source: str) -> list[dict[str, Any]]:
    """The mappings, at least one, that a YAML text holds, one a document. Raises UsageError."""
    try:
        documents = list(_documents(text)) or [None]
    except _Refused as problem:
        raise UsageError(f"{source}, line {problem.line}: {problem}") from None
    except yaml.reader.ReaderError as problem:
        line = text.count("\n", 0, problem.position) + 1
        raise UsageError(
            f"{source}, line {line} holds the character U+{problem.character:04X}, which YAML does not allow."
        ) from None
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{source}{where} is not YAML: {' '.join(filter(None, (problem.context, problem.problem)))}."
        ) from None
    except (yaml.YAMLError, ValueError) as problem:
        raise UsageError(f"{source} is not YAML: {problem}") from None
    except RecursionError:
        raise UsageError(f"{source} is no settings or study file: it is nested too deeply.") from None
    if not all(isinstance(settings, dict) and all(isinstance(key, str) for key in settings) for settings in documents):
        raise UsageError(f"{source} must hold lines of the form `setting: value`.")
    return documents


class _Refused(Exception):
    def __init__(self, node: yaml.Node, message: str) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


def _documents(text: str) -> Iterator[Any]:
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_node() and (node := loader.get_node()):
            most = 2 * len(text) + MOST_REPEATED  # no text has more than 2 values in a character
            if any(number > most for number, _ in enumerate(_checked(node))):
                raise _Refused(
                    node, f"aliases (*name) repeat more than {MOST_REPEATED:,} values. Write the values themselves."
                )
            yield loader.construct_document(node)
    finally:
        loader.dispose()


def _checked(node: yaml.Node) -> Iterator[yaml.Node]:
    """Every node below this one, once for each place that it is used in."""
    yield node
    kind = node.tag.removeprefix(PREFIX)
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, kind)
    elif kind not in TYPES:
        raise _Refused(node, f"no setting takes a value of the type {kind}.")
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(key, "a name must be one word before its colon.")
            if key.value in lines:
                raise _Refused(key, f"{_brief(key)} is given twice, here and in line {lines[key.value]}. Keep one.")
            lines[key.value] = key.start_mark.line + 1
            yield from _checked(key)
            yield from _checked(value)
    else:
        for value in node.value:
            yield from _checked(value)


def _check_scalar(node: yaml.ScalarNode, kind: str) -> None:
    wrong = NO_CHARACTER.search(node.value)
    if wrong:
        raise _Refused(node, f"a text holds U+{ord(wrong[0]):04X}, which is no character of a text.")
    if kind == "bool" and node.value.lower() not in yaml.SafeLoader.bool_values:
        raise _Refused(node, f"{_brief(node)} is neither true nor false.")
    if kind in PLAIN_NUMBERS and not PLAIN_NUMBERS[kind].fullmatch(node.value):
        raise _Refused(node, f"{_brief(node)} is no plain number, such as 10 or 0.5. If it is text, put it in quotes.")
    if kind not in PLAIN_NUMBERS and kind not in TYPES:
        raise _Refused(
            node, f"{_brief(node)} is of the type {kind}, which no setting takes. If it is text, put it in quotes."
        )


def _brief(node: yaml.ScalarNode) -> str:
    return node.value if len(node.value) <= 40 else f"{node.value[:40]}..."
