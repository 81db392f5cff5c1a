"""Exports results in the layout of the published study, which was run by hand with nanoGPT.

nanoGPT_results_PART/results.csv          one row per finished experiment
nanoGPT_results_PART/NAME/NAME.py         trains that configuration with nanoGPT; beside it lie files of the run folder
nanoGPT_results_PART/NAME/ckpt.pt         the weights for nanoGPT, if the study kept them
nanoGPT_results_PART/samples/NAME.txt
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from nanostudy.atomic import LEFTOVER, whole_folder
from nanostudy.errors import NanostudyError
from nanostudy.interop.nanogpt import check_tied
from nanostudy.interop.nanogpt_config import config_text, differences, train_settings
from nanostudy.interop.runs import CKPT, read_trained, write_ckpt
from nanostudy.result import Result, Status
from nanostudy.study.definition import keep_of
from nanostudy.study.folder import run_faults
from nanostudy.study.store import FILE, Store
from nanostudy.text import counted, listed
from nanostudy.training.run_folder import copy_bounded, read_metadata, write_metadata
from nanostudy.training.samples import read_samples
from nanostudy.training.window_losses import WINDOW_LOSSES

COLUMNS = ("Experiment", "Train Loss", "Val Loss", "Loss Gap", "Total Params", "Config Path")
TABLE = "results.csv"
CURVES = ("training.csv", "evaluations.csv")
WEIGHTS = ("best.safetensors", "last.safetensors")


def export_published(path: Path, to: Path) -> list[str]:
    """Writes the study's finished experiments under `to`. Returns lines that say what went where. The study may run meanwhile.

    Each part's folder appears whole or not at all, and keeps what an export does not write. Raises NanostudyError, also where
    such a folder holds other files and no export.
    """
    with Store.read(path / FILE) as store:
        rows = store.rows()
    keep = keep_of(path)
    parts = {part: to / f"nanoGPT_results_{part}" for part in dict.fromkeys(row.part for row in rows)}
    for folder in parts.values():
        _check_ours(folder)
    lines, incomplete = [], []
    for part, folder in parts.items():
        own = [row for row in rows if row.part == part]
        finished = [row for row in own if _has_result(row)]
        with whole_folder(folder, replace=True) as place:
            (place / "samples").mkdir()
            for row in finished:
                incomplete += [f"{row.name}: {what}" for what in _export_run(path / row.name, place, row, keep)]
            (place / TABLE).write_text(results_csv(finished), encoding="utf-8", newline="")
            _keep_others(folder, place)
        lines.append(f"{part}: {len(finished)} of {counted(len(own), 'experiment')}   {folder / TABLE}")
    return lines + incomplete + _left_out(rows)


def results_csv(rows: Sequence[Result]) -> str:
    """The published table of finished experiments. The gap is that of the rounded losses beside it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        assert row.train_loss is not None
        assert row.val_loss is not None
        train, val = round(row.train_loss, 4), round(row.val_loss, 4)
        losses = [f"{value:.4f}" for value in (train, val, val - train)]
        name = safe(row.name)
        writer.writerow([row.name, *losses, total_params(row), f"{name}/{name}.py"])
    return text.getvalue()


def total_params(row: Result) -> float:
    """What nanoGPT prints: without the position embeddings, in millions with two decimals."""
    positions = row.experiment.block_size * row.experiment.n_embd
    return float(f"{(row.parameters - positions) / 1e6:.2f}e6")


def safe(name: str) -> str:
    """For files and folders: nanoGPT reads an argument with = as a setting, not as a file."""
    return name.replace("=", "-")


# --- the configuration


def config_py(row: Result) -> str:
    """A configuration that nanoGPT's train.py runs as Python. ASCII, since it is read in the system's encoding."""
    e, name = row.experiment, safe(row.name)
    title = f"{row.name}: in nanoGPT's folder, python train.py {name}.py"
    return config_text(title, differences(e), train_settings(e, _out_dir(row)))


def _out_dir(row: Result) -> str:
    return f"nanoGPT_results_{row.part}/{safe(row.name)}"


# --- files


def _export_run(run: Path, folder: Path, row: Result, keep: str) -> list[str]:
    """Exports one experiment's files but what is damaged. Returns, in words, what could not be exported."""
    name = safe(row.name)
    target = folder / name
    target.mkdir()
    (target / f"{name}.py").write_text(config_py(row), encoding="utf-8", newline="")
    problems = run_faults(run, keep)
    metadata = None if "run.json" in problems else read_metadata(run)
    if metadata:
        write_metadata(target, metadata)
    missing = [] if metadata or "run.json" in problems else ["run.json"]
    for file in (*CURVES, WINDOW_LOSSES, *WEIGHTS):
        copied = file in problems or _copy(run / file, target / file, link=file in WEIGHTS)
        if not copied and file in CURVES:  # older runs have no losses of windows, and a study may keep no weights
            missing.append(file)
    try:
        read_samples(run)
        _copy(run / "sample.txt", folder / "samples" / f"{name}.txt")
    except NanostudyError as problem:
        problems["sample.txt"] = str(problem)
    notes = [f"{listed(missing)} not there, not exported"] if missing else []
    notes += [f"{problem} It is not exported." for problem in problems.values()]
    return notes + _export_checkpoint(run, target, row)


def _export_checkpoint(run: Path, target: Path, row: Result) -> list[str]:
    """Exports the last weights, or else the best, as nanoGPT would have saved them. Returns, in words, why kept weights were not.

    A study keeps no optimizer's state, so AdamW starts afresh where nanoGPT goes on.
    """
    paths = {which: run / f"{which}.safetensors" for which in ("last", "best")}
    kept = [which for which, path in paths.items() if path.is_file() and not path.is_symlink()]
    if not kept:
        return []
    try:
        trained = read_trained(run, kept[0])
        check_tied(trained.weights.config)
    except NanostudyError as problem:
        return [f"no {CKPT}: {problem}"]
    write_ckpt(trained, target / CKPT, _out_dir(row))
    return []


def _copy(source: Path, target: Path, link: bool = False) -> bool:
    """By a link if `link` is true and that works. False where there is no source, or none that may be read."""
    if source.is_symlink() or not source.exists():
        return False
    if link and _link(source, target):
        return True
    try:
        copy_bounded(source, target, None)
    except ValueError:
        return False
    except FileNotFoundError:
        if source.exists():
            raise
        return False
    return True


def _link(source: Path, target: Path) -> bool:
    """Makes both one file, which costs no space: weights are never written in place, so neither changes the other. False where it fails."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        return False
    return True


def _check_ours(folder: Path) -> None:
    """Raises NanostudyError where it holds files, and no export or table of the published layout."""
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")] if folder.is_dir() else []
        header = ",".join(COLUMNS).encode()
        ours = not names or (TABLE in names and (folder / TABLE).read_bytes().startswith(header))
    except OSError as problem:
        raise NanostudyError(
            f"{folder} cannot be written: {problem.strerror or problem}. Name another folder with --to."
        ) from None
    if not ours:
        raise NanostudyError(
            f"{folder} holds other files, and no export. Name another folder with --to; nothing was changed."
        )


def _keep_others(folder: Path, place: Path) -> None:
    """Takes into the new folder what the one before holds beside an export: a person's notes, what nanoGPT trained there."""
    for source in sorted(folder.rglob("*")):
        target = place / source.relative_to(folder)
        if source.is_dir() and not source.is_symlink():
            target.mkdir(exist_ok=True)
        elif not os.path.lexists(target) and not LEFTOVER.fullmatch(source.name) and not _link(source, target):
            shutil.copy2(source, target, follow_symlinks=False)


# --- what is left out


def _has_result(row: Result) -> bool:
    return row.status is Status.FINISHED and row.train_loss is not None and row.val_loss is not None


def _left_out(rows: Sequence[Result]) -> list[str]:
    ended = [row for row in rows if not row.status.is_undone and not _has_result(row)]
    lines = [f"{row.status}, so not in the tables: {row.name} ({row.reason or 'no loss'})" for row in ended]
    unfinished = sum(row.status.is_undone for row in rows)
    if unfinished:
        lines.append(f"{counted(unfinished, 'experiment')} unfinished, so not in the tables")
    return lines
