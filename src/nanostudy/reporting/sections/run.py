"""What a report says of one training, from its run folder: summary, observations, metrics, evaluations, model, settings, machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nanostudy.analysis import curves
from nanostudy.analysis.curves import difference
from nanostudy.analysis.frames import known
from nanostudy.analysis.text_error import expected
from nanostudy.measures import MEASURES, NATS
from nanostudy.reporting.document import Blocks, Bullets, Facts, Grid, Prose
from nanostudy.reporting.findings import ENTROPY, Findings, Training
from nanostudy.reporting.phrases import amount, ends
from nanostudy.settings import FIELDS
from nanostudy.text import counted, digits, duration, value_text

MOST_EVALUATIONS = 40  # rows of the table; evaluations.csv has them all
MASTHEAD = ("val_loss", "best_val_loss", "parameters", "tokens", "epochs", "seconds")


def lede(t: Training) -> str:
    machine = t.metadata["machine"]
    text = (
        f"A GPT with {t.model()} was trained on {t.corpus['name']} for {t.length()}. It ran on {machine['device']} "
        f"({machine['device_name']}, {machine['precision']})."
    )
    return text if t.evaluations else f"{text} It was never evaluated."


def notes(t: Training) -> list[str]:
    """What a reader must know first."""
    m = t.metadata
    lines = [f"About the text: {t.corpus['note']}"] if t.corpus.get("note") else []
    if m["status"] == "diverged":
        lines.append(f"The training diverged: {m['diverged']}. The losses are from before that.")
    elif m["status"] != "finished":
        lines.append(f"The training has not finished: {t.step:,} of {t.experiment.max_iters:,} updates.")
    return lines


def totals(row: Any) -> dict[str, str]:
    return {_title(name): amount(row[name], name) for name in MASTHEAD if known(row[name])}


def _title(name: str) -> str:
    return MEASURES[name].axis if MEASURES[name].unit == NATS else MEASURES[name].title


def observations(t: Training) -> Blocks:
    lines = curves.observations(t.evaluations, t.log, t.experiment, t.entropy, t.characters_per_token)
    course = [curves.course(t.evaluations)] if len(t.evaluations) > 1 else []
    return [Bullets([*course, *lines])]


def metrics(f: Findings) -> Blocks:
    t = f.training
    if t is None:
        return []
    row = f.results.experiments.iloc[0]
    values = {_title(name): _whole(row[name], name) for name in MEASURES if name in row and known(row[name])}
    values["updates"] = f"{t.metadata.get('updates', t.step):,} of {t.experiment.max_iters:,}"
    skipped = t.metadata.get("skipped_updates", 0)
    values |= {"updates skipped, their gradient not being finite": f"{skipped:,}"} if skipped else {}
    values |= _marks(t) | _of_the_text(f) | _speeds(t)
    return [Facts(values), Prose(_how_measured(t)), _contexts(t)]


def _whole(value: float, name: str) -> str:
    """Counts in full: 1,920 instead of 1.92 k."""
    exact = MEASURES[name].decimals is None and abs(value) < 1e9
    return f"{value:,.0f}" if exact else amount(value, name)


def _marks(t: Training) -> dict[str, str]:
    if not t.evaluations:
        return {}
    final = "final" if t.metadata["status"] == "finished" else "last"
    rows = {"initial": t.evaluations[0]} if len(t.evaluations) > 1 else {}
    rows |= {final: t.evaluations[-1], "best": curves.best(t.evaluations)}
    return {f"{mark} losses, update {curves.step(row)}": curves.losses(row) for mark, row in rows.items()}


def _of_the_text(f: Findings) -> dict[str, str]:
    """The intervals that a finite text gives to the final losses."""
    finished = f.results.finished
    values = {}
    for by in ("val_loss", "test_loss", "gap") if len(finished) else ():
        if finished[by].notna().all() and (one := expected(f.results, list(finished.index), by)).has_interval:
            values[f"{MEASURES[by].title}, 95% interval over {one.about}"] = ends(one.low, one.high)
    return values


def _speeds(t: Training) -> dict[str, str]:
    speeds = {}
    if measured := curves.median_speed(t.log):
        speeds["speed while training"] = _speed(measured[0], t)
    if t.seconds and t.tokens:
        speeds["speed overall, evaluations included"] = _speed(t.tokens / t.seconds, t)
    return speeds


def _speed(tokens_per_second: float, t: Training) -> str:
    updates = tokens_per_second / t.experiment.tokens_per_update
    return f"{digits(tokens_per_second)} tokens/s, {digits(updates)} updates/s"


def _how_measured(t: Training) -> str:
    block = t.experiment.block_size
    windows = -(-(t.corpus["val"]["tokens"] - 1) // block)
    text = (
        f"Losses are mean cross entropies, without dropout, over fixed windows of {block:,} tokens: the {windows:,} that cover "
        "the whole validation split, and at most as many spread evenly over the training split. Initial is before the first "
        "update, final after the last, best at the lowest validation loss. "
        f"Guessing all tokens alike costs ln {t.vocabulary} = {math.log(t.vocabulary):.4f} nats per token."
    )
    if t.experiment.eval_tokens:
        text += (
            f" Evaluations before the last read a fixed subset of {t.experiment.eval_tokens:,} tokens of each split "
            "(eval_tokens): their losses may differ from exact ones. The last is exact."
        )
    if measured := curves.median_speed(t.log):
        text += f" The speed while training is the median of {counted(measured[1], 'log row')}, evaluations left out."
    return text


def _contexts(t: Training) -> Grid:
    losses = {int(c): loss for c, loss in t.metadata.get("context_losses", {}).items()}
    bits = {c: loss / t.characters_per_token / math.log(2) for c, loss in losses.items()}
    caption = "The last weights' validation loss in windows of fixed lengths, at which runs of any context compare"
    rows = [
        {"context, tokens": f"{c:,}", NATS: f"{losses[c]:.4f}", "bits per character": f"{bits[c]:.4f}"}
        for c in sorted(losses)
    ]
    return Grid(caption, rows)


def evaluations(t: Training) -> Blocks:
    if not t.evaluations:
        return []
    best, every = curves.best(t.evaluations), -(-len(t.evaluations) // MOST_EVALUATIONS)
    rows = [
        {
            "update": f"{curves.step(row)}{' (best)' if row is best else ''}",
            "tokens": int(row["tokens"]),
            "time": duration(row["seconds"]),
            "training loss": difference(row["train_loss"]),
            "validation loss": difference(row["val_loss"]),
            "gap": difference(curves.gap(row)),
            "validation, bits per character": difference(row["val_bits_per_character"]),
        }
        for i, row in enumerate(t.evaluations)
        if i % every == 0 or row is best or row is t.evaluations[-1]
    ]
    blocks: Blocks = [Grid("Losses are in nats per token", rows)]
    if len(rows) < len(t.evaluations):
        blocks.append(Prose(f"These are {len(rows)} of {len(t.evaluations):,}; evaluations.csv has all."))
    if t.left_out:
        blocks.append(Prose(f"Left out, their loss not being finite: {t.left_out:,}."))
    return blocks


def model(t: Training) -> Blocks:
    e, count = t.experiment, t.metadata["parameters"]
    facts = {
        "parameters, as nanoGPT counts": f"{count['without_positions']:,} (without position embeddings)",
        "parameters, all": f"{count['total']:,}",
        "layers / heads / width": f"{e.n_layer} / {e.n_head} / {e.n_embd}",
        "context": f"{e.block_size:,} tokens",
        "biases": value_text(e.bias),
        "head shares the token embedding's weights": value_text(e.tie_embeddings),
        "first weights": "fresh" if e.init_from is None else f"from {e.init_from}",
    }
    return [Facts(facts)]


def corpus(t: Training) -> Blocks:
    c = t.corpus
    requested = f" (requested: {c['requested']})" if c["requested"] != c["name"] else ""
    facts = {"text": f"{c['name']}{requested}", "SHA-256": c["sha256"]}
    for label, split in {"training split": c["train"], "validation split": c["val"]}.items():
        entropy = "" if split[ENTROPY] is None else f", entropy {split[ENTROPY]:.4f} nats per character"
        facts[label] = f"{split['characters']:,} characters, {split['tokens']:,} tokens{entropy}"
    facts["tokenizer"] = f"{c['tokenizer']['kind']}: {t.vocabulary:,} different tokens"
    return [Facts(facts)]


def settings(t: Training) -> Blocks:
    """Each as a settings file has it."""
    e = t.experiment
    decay = {"lr_decay_iters": f"{e.max_iters} (max_iters)", "min_lr": f"{e.learning_rate / 10:g} (learning_rate / 10)"}
    rows = []
    for name, field in FIELDS.items():
        value = getattr(e, name)
        text = value_text(value)
        text = f"{text}: {decay[name]}" if value is None and name in decay and e.decay_lr else text
        rows.append({"setting": name, "value": text if text.strip() else repr(text), "meaning": field.meaning})
    return [Grid("All settings", rows)]


def environment(t: Training) -> Blocks:
    m, machine = t.metadata, t.metadata["machine"]
    facts = {
        "nanostudy": f"{m['nanostudy']} (numerics version {m['numerics_version']})",
        "Python": str(machine["python"]),
        "PyTorch": str(machine["torch"]),
        "platform": str(machine["platform"]),
        "identity of the run": m["identity"],
    }
    return [Facts(facts)]


def hardware(t: Training) -> Blocks:
    m, machine = t.metadata, t.metadata["machine"]
    facts = {
        "device": f"{machine['device']}: {machine['device_name']}",
        "precision": machine["precision"],
        "CPU threads": str(machine["threads"]),
        "kernels compiled": value_text(machine["compiled"]),
    }
    if machine.get("ranks", 1) > 1:
        facts["ranks"] = f"{machine['ranks']}, each with these threads"
    resumed = ", ".join(f"{session['after_update']:,}" for session in m.get("sittings", [])[1:])
    lines: Sequence[str] = [*m.get("notes", []), *([f"resumed at update {resumed}"] if resumed else [])]
    return [Facts(facts), Bullets(lines)]
