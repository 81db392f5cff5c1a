"""The training report of one run folder: curve.png and report.md, from nothing but what lies there."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanostudy.analysis import curves as curve
from nanostudy.analysis.curves import Row, difference
from nanostudy.atomic import write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.reporting import training_curve as figures
from nanostudy.settings import FIELDS, Experiment, SamplingParams, from_settings
from nanostudy.text import counted, digits, duration, plain, table
from nanostudy.training.run_folder import read_metadata, read_rows

MOST_EVALUATIONS = 40  # rows of the report's table; evaluations.csv has them all


def write_report(folder: Path) -> list[Path]:
    """Writes curve.png (where there is a loss to draw) and report.md; returns their paths. Raises NanostudyError."""
    run = _Run.read(folder)
    picture = _picture(run)
    sections = [
        _summary(run),
        *(section(run) for section in (_surroundings, _corpus, _model, _settings, _metrics)),
        _curve(run, picture),
        *(section(run) for section in (_evaluations, _observations, _sample, _repeat)),
    ]
    files: dict[str, bytes | str] = {"curve.png": picture} if isinstance(picture, bytes) else {}
    files["report.md"] = "\n\n".join("\n".join(section) for section in sections if section) + "\n"
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


@dataclass(frozen=True)
class _Run:
    """A run folder, read."""

    metadata: dict[str, Any]
    corpus: dict[str, Any]
    machine: dict[str, Any]
    experiment: Experiment
    evaluations: Sequence[Row]  # with finite losses
    left_out: int  # evaluations without
    training: Sequence[Row]
    sample: str | None
    step: int  # updates so far, skipped ones included
    tokens: int
    seconds: float | None
    vocabulary: int
    characters_per_token: float  # of the validation split
    entropy: float | None  # of the validation text, nats per token

    @staticmethod
    def read(folder: Path) -> _Run:
        m = read_metadata(folder)
        if m is None:
            raise NanostudyError(f"{folder} holds no run.json. Name a folder that `nanostudy train` wrote.")
        c, e = m["corpus"], from_settings(m["settings"])
        rows, training = read_rows(folder / "evaluations.csv"), read_rows(folder / "training.csv")
        evaluations = curve.finite(rows, "train_loss", "val_loss")
        path = folder / "sample.txt"
        sample = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        counted = m.get("updates", 0) + m.get("skipped_updates", 0)
        step = max([counted, *(int(table[-1]["step"]) for table in (rows, training) if table)])
        tokens = m.get("tokens", step * e.tokens_per_update)
        seconds = m.get("seconds", rows[-1]["seconds"] if rows else None)
        vocabulary = len(c["tokenizer"]["characters"]) if c["tokenizer"]["kind"] == "char" else 256
        per_token, known = c["val"]["characters"] / c["val"]["tokens"], c["val"]["entropy_nats_per_character"]
        entropy = None if known is None else known * per_token
        left, so_far = len(rows) - len(evaluations), (step, tokens, seconds)
        return _Run(m, c, m["machine"], e, evaluations, left, training, sample, *so_far, vocabulary, per_token, entropy)

    def model(self) -> str:
        e, count = self.experiment, self.metadata["parameters"]["without_positions"]
        shape = f"{counted(e.n_layer, 'layer')}, {counted(e.n_head, 'head')}, width {e.n_embd}, context {e.block_size}"
        return f"{count:,} parameters ({shape})"

    def epochs(self) -> str:
        return f"{digits(self.tokens / self.corpus['train']['tokens'])} epochs"

    def length(self) -> str:
        skipped, seconds = self.metadata.get("skipped_updates", 0), self.seconds
        notes = (f" ({skipped:,} skipped)" if skipped else "") + ("" if seconds is None else f" in {duration(seconds)}")
        return f"{counted(self.step, 'update')}{notes}: {self.tokens:,} tokens, {self.epochs()}"


# --- sections: lines of Markdown


def _summary(run: _Run) -> list[str]:
    m, machine, evaluations = run.metadata, run.machine, run.evaluations
    lines = [f"# Training report: {plain(m['name'])}", ""]
    if run.corpus.get("note"):
        lines += [f"> **About the text: {plain(run.corpus['note'])}**", ""]
    if m["status"] == "diverged":
        lines += [f"**The training diverged: {plain(m['diverged'])}.** The losses are from before that.", ""]
    elif m["status"] != "finished":
        lines += [f"**The training has not finished:** {run.step:,} of {run.experiment.max_iters:,} updates.", ""]
    told = (
        f"A GPT with {run.model()} was trained on {plain(run.corpus['name'])} for {run.length()}. "
        f"It ran on {machine['device']} ({plain(machine['device_name'])}, {machine['precision']})."
    )
    if not evaluations:
        return [*lines, f"{told} It was never evaluated."]
    best, told = curve.best(evaluations), f"{told} {curve.course(evaluations)}"
    if len(evaluations) > 1:
        where = f"at update {curve.step(best)}{', the last evaluated' if best is evaluations[-1] else ''}"
        told += f" The lowest validation loss, {best['val_loss']:.4f}, was {where}."
    if run.entropy is not None:
        told += f" That is {curve.above_entropy(best, run.entropy, run.characters_per_token)}."
    return [*lines, told]


def _surroundings(run: _Run) -> list[str]:
    m, machine = run.metadata, run.machine
    software = [("nanostudy", f"{m['nanostudy']} (numerics version {m['numerics_version']})")]
    software += [("Python", machine["python"]), ("PyTorch", machine["torch"]), ("platform", machine["platform"])]
    software.append(("identity of the run", m["identity"]))
    hardware = [("device", f"{machine['device']}: {machine['device_name']}"), ("precision", machine["precision"])]
    hardware += [("CPU threads", machine["threads"]), ("kernels compiled", machine["compiled"])]
    if machine.get("ranks", 1) > 1:
        hardware.append(("ranks", f"{machine['ranks']}, each with these threads"))
    resumed = ", ".join(f"{step:,}" for step in _resumes(m))
    notes = [*m.get("notes", []), *([f"resumed at update {resumed}"] if resumed else [])]
    lines = ["## Environment", "", *table(("what", "value"), software), "", "## Hardware", ""]
    return [*lines, *table(("what", "value"), hardware), *([""] if notes else []), *(f"- {plain(n)}" for n in notes)]


def _corpus(run: _Run) -> list[str]:
    c = run.corpus
    asked = f" (asked for: {c['requested']})" if c["requested"] != c["name"] else ""
    rows = [("text", f"{c['name']}{asked}"), ("SHA-256", c["sha256"])]
    for label, split in (("training split", c["train"]), ("validation split", c["val"])):
        entropy = split["entropy_nats_per_character"]
        known = "" if entropy is None else f", entropy {entropy:.4f} nats per character"
        rows.append((label, f"{split['characters']:,} characters, {split['tokens']:,} tokens{known}"))
    rows.append(("tokenizer", f"{c['tokenizer']['kind']}: {run.vocabulary:,} different tokens"))
    return ["## Corpus", "", *table(("what", "value"), rows)]


def _model(run: _Run) -> list[str]:
    e, count = run.experiment, run.metadata["parameters"]
    rows = [
        ("parameters, as nanoGPT counts", f"{count['without_positions']:,} (without position embeddings)"),
        ("parameters, all", count["total"]),
        ("layers / heads / width", f"{e.n_layer} / {e.n_head} / {e.n_embd}"),
        ("context", f"{e.block_size:,} tokens"),
        ("biases", e.bias),
        ("head shares the token embedding's weights", e.tie_embeddings),
        ("first weights", "fresh" if e.init_from is None else f"from {e.init_from}"),
    ]
    return ["## Model", "", *table(("what", "value"), rows)]


def _settings(run: _Run) -> list[str]:
    """Each as a settings file has it."""
    e, rows = run.experiment, []
    decay = {"lr_decay_iters": f"{e.max_iters} (max_iters)", "min_lr": f"{e.learning_rate / 10:g} (learning_rate / 10)"}
    for name, field in FIELDS.items():
        value = getattr(e, name)
        shown = value if isinstance(value, str) and value.strip() else json.dumps(value)
        if value is None:
            shown = f"none: {decay[name]}" if name in decay and e.decay_lr else "none"
        rows.append((name, shown, field.meaning))
    return ["## Settings", "", *table(("setting", "value", "meaning"), rows)]


def _metrics(run: _Run) -> list[str]:
    e, m, evaluations, skipped = run.experiment, run.metadata, run.evaluations, run.metadata.get("skipped_updates", 0)
    rows = [("time of training and evaluation", duration(run.seconds))] if run.seconds is not None else []
    rows.append(("updates made", f"{m.get('updates', run.step):,} of {e.max_iters:,}"))
    rows += [("updates skipped, their gradient not being finite", f"{skipped:,}")] if skipped else []
    rows.append(("tokens trained on", f"{run.tokens:,}, or {run.epochs()} of the training split"))
    if evaluations:
        final = "final" if m["status"] == "finished" else "last"
        marks = [("initial", evaluations[0])] if len(evaluations) > 1 else []
        marks += [(final, evaluations[-1]), ("best", curve.best(evaluations))]
        rows += [(f"{mark} losses, update {curve.step(row)}", curve.losses(row)) for mark, row in marks]
        gap = difference(curve.gap(evaluations[-1]))
        rows.append((f"{final} gap: validation less training loss", f"{gap} nats per token"))
    windows = -(-(run.corpus["val"]["tokens"] - 1) // e.block_size)
    told = (
        f"Losses are mean cross entropies, without dropout, over fixed windows of {e.block_size:,} tokens: the "
        f"{windows:,} that cover the whole validation split, and at most as many spread evenly over the training "
        "split. Initial is before the first update, final after the last, best at the lowest validation loss. "
        f"Guessing all tokens alike costs ln {run.vocabulary} = {math.log(run.vocabulary):.4f} nats per token."
    )
    speed = curve.median_speed(run.training)
    if speed:
        rows.append(("speed while training", _speed(speed[0], e)))
        told += f" The speed while training is the median of {counted(speed[1], 'log row')}, evaluations left out."
    if run.seconds and run.tokens:
        rows.append(("speed overall, evaluations included", _speed(run.tokens / run.seconds, e)))
        told += " The speed overall is all tokens over all the time."
    return ["## Metrics", "", *table(("metric", "value"), rows), "", told, *_contexts(run)]


def _contexts(run: _Run) -> list[str]:
    losses = {int(c): loss for c, loss in run.metadata.get("context_losses", {}).items()}
    if not losses:
        return []
    told = "The last weights' validation loss in windows of fixed lengths, at which runs of any context compare:"
    bits = {c: loss / run.characters_per_token / math.log(2) for c, loss in losses.items()}
    rows = [(f"{c:,}", f"{losses[c]:.4f}", f"{bits[c]:.4f}") for c in sorted(losses)]
    return ["", told, "", *table(("context, tokens", "nats per token", "bits per character"), rows)]


def _curve(run: _Run, picture: bytes | str) -> list[str]:
    course = f" {curve.course(run.evaluations)}" if run.evaluations else ""
    image = f"![Losses against updates.{course}](curve.png)"
    return ["## Curve", "", image if isinstance(picture, bytes) else plain(picture)]


def _evaluations(run: _Run) -> list[str]:
    every = -(-len(run.evaluations) // MOST_EVALUATIONS)
    lines, rows = ["## Evaluations", ""], []
    for i, row in enumerate(run.evaluations):
        best = row is curve.best(run.evaluations)
        if i % every == 0 or best or row is run.evaluations[-1]:
            numbers = (row["train_loss"], row["val_loss"], curve.gap(row), row["val_bits_per_character"])
            start = (f"{curve.step(row)}{' (best)' if best else ''}", int(row["tokens"]), duration(row["seconds"]))
            rows.append((*start, *(difference(number) for number in numbers)))
    header = ("update", "tokens", "time", "training loss", "validation loss", "gap", "validation, bits per character")
    lines += table(header, rows) if rows else ["None was recorded."]
    if len(rows) < len(run.evaluations):
        lines += ["", f"These are {len(rows)} of {len(run.evaluations):,}; evaluations.csv has all."]
    return [*lines, "", f"Left out, their loss not being finite: {run.left_out:,}."] if run.left_out else lines


def _observations(run: _Run) -> list[str]:
    told = curve.observations(run.evaluations, run.training, run.experiment, run.entropy, run.characters_per_token)
    return ["## Observations", "", *(f"- {sentence}" for sentence in told)]


def _resumes(metadata: dict[str, Any]) -> list[int]:
    return [sitting["after_update"] for sitting in metadata.get("sittings", [])[1:]]


def _sample(run: _Run) -> list[str]:
    """The text as it is, in a fence that it cannot close; control characters become replacement characters."""
    if run.sample is None:
        return []
    text = "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in run.sample)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    how = f"temperature {SamplingParams.temperature}, top-k {SamplingParams.top_k}, seed {run.experiment.seed}"
    told = f"What the weights with the lowest validation loss write (sample.txt; {how}):"
    return ["## Sample", "", told, "", f"{fence}text", text.removesuffix("\n"), fence]


def _repeat(run: _Run) -> list[str]:
    told = f"`settings.yaml` lies beside this report. The text must have the SHA-256 {run.corpus['sha256']}."
    return ["## How to repeat it", "", "```", "nanostudy train settings.yaml", "```", "", told]


def training_chart(folder: Path) -> Any:
    """A run's curve as an Altair chart. Raises NanostudyError, also where there is nothing to draw."""
    try:
        return _drawn(_Run.read(folder))
    except figures.NothingToDraw:
        raise NanostudyError(f"No loss was recorded in {folder} that could be drawn.") from None


def _drawn(run: _Run) -> Any:
    m, clip = run.metadata, run.experiment.grad_clip
    title = m["name"] if m["status"] == "finished" else f"{m['name']} ({m['status']})"
    words = (f"{run.corpus['name']}: {run.model()}", run.length())
    tables = (run.evaluations, run.training)
    return figures.training_curve(*tables, title, words, entropy=run.entropy, grad_clip=clip)


def _picture(run: _Run) -> bytes | str:
    """The curve, or why there is none."""
    try:
        return figures.png(_drawn(run))
    except figures.NothingToDraw:
        return "No loss was recorded that could be drawn."
    except figures.DrawingFailed as problem:
        return f"The curve could not be drawn here ({problem}). `nanostudy report` draws it elsewhere."


def _speed(tokens_per_second: float, e: Experiment) -> str:
    return f"{digits(tokens_per_second)} tokens/s, {digits(tokens_per_second / e.tokens_per_update)} updates/s"
