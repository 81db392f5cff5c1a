"""Writes the tree of modules into docs/architecture.md: `python tests/docs/module_tree.py`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "nanostudy"
PAGE = ROOT / "docs" / "architecture.md"
BETWEEN = re.compile(r"(<!-- tree: .*? -->\n).*?(<!-- end of the tree -->)", re.DOTALL)
ROOMS = ("model", "data", "training", "interop", "study", "analysis", "reporting", "cli")  # as data flows
SPINE = (
    *("settings", "model/config", "model/gpt", "model/layers", "model/ops", "model/optim", "model/engine"),
    *("training/train", "study/grid", "study/plan", "study/execute"),
    *("analysis/design", "analysis/effects", "analysis/ranking"),
)


def modules(folder: Path) -> list[Path]:
    """Every module with something in it, those of the folder itself first."""
    own = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py" or path.stat().st_size)
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    if folder == SOURCE:
        inner = [SOURCE / room for room in ROOMS] + [path for path in inner if path.name not in ROOMS]
    return own + [path for one in inner for path in modules(one)]


def first_line(path: Path) -> str:
    """What the module says is behind its door."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def tree() -> str:
    """A table of modules per room."""
    lines, room = [], None
    for path in modules(SOURCE):
        if path.parent != room:
            room = path.parent
            lines += [
                "",
                f"**{room.relative_to(SOURCE.parent).as_posix()}/**",
                "",
                "| module | what is in it |",
                "|---|---|",
            ]
        meaning = first_line(path).replace("|", "\\|")
        lines.append(f"| `{path.name}` | {meaning} |")
    return "\n".join(lines[1:]) + "\n"


def spine_lines() -> int:
    return sum(len((SOURCE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in SPINE)


def with_tree(page: str) -> str:
    return BETWEEN.sub(lambda match: f"{match[1]}\n{tree()}\n{match[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
