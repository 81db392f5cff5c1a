"""What was measured on one machine, as text and as JSON: written whenever there is more of it."""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ceilings import ceilings, share_of_ceiling
from workloads import CELL, PUBLISHED, Row

from nanostudy.model.config import GPTConfig
from nanostudy.training.machine import Machine


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| workload | ours, s | nanoGPT, s | ratio | aim | turns |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = (f"{statistics.median(times):.4g}" if times else "" for times in (row.ours, row.theirs))
        ratios = row.ratios
        spread = f" ({min(ratios):.1f} to {max(ratios):.1f})" if len(ratios) > 1 else ""
        ratio = f"**{statistics.median(ratios):.1f}x**{spread}" if ratios else ""
        lines.append(f"| {row.workload} (per {row.unit}) | {a} | {b} | {ratio} | {row.aim} | {len(row.ours)} |")
    lines += ["", *(f"- {row.workload}: {row.note}." for row in rows if row.note)]
    return lines


def reached(rows: list[Row], rates: dict[str, float], machine: Machine) -> list[str]:
    """What share of the machine's rate of products each training reaches."""
    lines = []
    for row in rows:
        sizes = {"published CPU": PUBLISHED, "grid cell": CELL}
        settings = next((cell for start, cell in sizes.items() if row.workload.startswith(start)), None)
        if settings is None or not row.ours:
            continue
        shape = GPTConfig(
            settings["n_layer"], settings["n_head"], settings["n_embd"], settings["block_size"], 65, False, True
        )
        updates = 1000 if row.unit == "experiment" else 1
        tokens = updates * settings["batch_size"] * settings["block_size"] / statistics.median(row.ours)
        precision = "fp32" if "fp32" in row.workload else machine.precision
        share = share_of_ceiling(shape, tokens, rates[f"{precision} products, FLOP/s"])
        lines.append(f"- {row.workload}: {tokens:,.0f} tokens/s, {share:.0%} of the rate of {precision} products.")
    return lines


@dataclass
class Outcome:
    """What was measured on this machine. Written whenever there is more of it."""

    path: Path
    machine: Machine
    ceilings: dict[str, float]
    rows: dict[str, Row]
    found: dict[str, list[str]]  # by step, what is no row

    @staticmethod
    def begin(folder: Path, machine: Machine, keep: bool) -> Outcome:
        """`keep`: with the rows of an earlier measurement, of which some are measured again."""
        name = re.sub(r"[^a-z0-9]+", "-", f"{machine.device_name} {machine.threads}".lower()).strip("-")
        path = folder / f"{name}.json"
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if keep and path.is_file() else {}
        rows = {row["workload"]: Row(**row) for row in before.get("rows", [])}
        return Outcome(path, machine, ceilings(machine), rows, before.get("found", {}))

    def machine_lines(self) -> list[str]:
        m = self.machine
        name = f"# {m.device_name}, {m.threads} threads, {m.precision}"
        return [name, "", *(f"- {what}: {rate:.3g}" for what, rate in self.ceilings.items())]

    def begin_step(self, step: str) -> None:
        self.found.pop(step, None)

    def add(self, step: str, made: Row | str) -> str:
        """What to print of it."""
        if isinstance(made, str):
            self.found.setdefault(step, []).append(made)
            return made
        self.rows[made.workload] = made
        return "\n".join(table([made])[2:])

    def lines(self) -> list[str]:
        m, rows = self.machine, list(self.rows.values())
        return [
            self.machine_lines()[0],
            "",
            f"{time.strftime('%Y-%m-%d')}, PyTorch {torch.__version__}, {platform.system()}. Times are medians of the turns; ratios, medians of each turn's, with the lowest and highest.",
            "",
            *table(rows),
            "",
            "## Ceilings",
            "",
            *self.machine_lines()[2:],
            *reached(rows, self.ceilings, m),
            *(line for step, lines in self.found.items() for line in ("", f"## {step}", "", *lines)),
        ]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".md").write_text("\n".join(self.lines()) + "\n", encoding="utf-8")
        content = {
            "machine": self.machine.as_dict(),
            "ceilings": self.ceilings,
            "rows": [asdict(row) for row in self.rows.values()],
            "found": self.found,
        }
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
