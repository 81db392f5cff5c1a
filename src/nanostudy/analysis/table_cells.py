"""The cells of a table: numbers as people and programs write them, settings and factors, names that say settings, what became of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from nanostudy.analysis.frames import OURS
from nanostudy.errors import UsageError
from nanostudy.measures import stored
from nanostudy.result import Status
from nanostudy.settings import FIELDS, Experiment, check_value
from nanostudy.study.grid import IN_PUBLISHED_NAME, LONGEST_NAME

LOSSES = ("train_loss", "val_loss")
COUNTS = ("id", "parameters", "updates", "best_step", "tokens", "seconds")  # thousands separators may stand in them
NUMBERS = (*dict.fromkeys((*COUNTS, "gap", *stored())),)
FINISHED = "finished complete completed done success succeeded ok terminated converged"
FAILED = "failed crash crashed error killed pruned stopped cancelled canceled preempted aborted oom"
STATUSES: dict[str, Status] = {  # in other programs' words
    **dict.fromkeys(FINISHED.split(), Status.FINISHED),
    **dict.fromkeys(FAILED.split(), Status.FAILED),
    **dict.fromkeys(("pending", "queued", "waiting"), Status.WAITING),
    "running": Status.RUNNING,
    "diverged": Status.DIVERGED,
}
NO_NUMBER = ("", "-", "na", "n/a", "#n/a", "null", "none", "<na>")
NOT_FINITE = ("nan", "inf", "+inf", "-inf", "infinity", "-infinity")
DECIMAL = re.compile(r"[+-]?(?=\.?\d)\d*\.?(\d*)(?:[eE]([+-]?\d{1,9}))?", re.ASCII)  # groups: fraction, exponent
THOUSANDS = r"[+-]?\d{1,3}(?:[,\u0020\u00a0\u202f'_]\d{3})+(?:\.\d*)?"  # 800,000.0; or with spaces, apostrophes
LETTERED = {"k": "e3", "m": "e6", "b": "e9"}  # 10.7M
DURATION = re.compile(r"(?:(\d{1,6}) days? ?)?(\d{1,6}):(\d{1,2}):(\d{1,2}(?:\.\d+)?)")  # as Optuna and clocks write it
LOGARITHMS = {"bpb": "bits per byte", "bpc": "bits per character", "ppl": "perplexity", "perplexity": "perplexity"}
MILLIONS = 1000  # a number of parameters below it is one of millions
EARLY = 0.95  # of max_iters: a run that ended before did not finish
LONGEST_TEXT = 80  # characters of a factor's value

# b64_L4_H4_E128_BS8_MI1000_D10_s1, as the published study and this project write it
NAME = re.compile(
    r"b(?P<block_size>\d+)_L(?P<n_layer>\d+)_H(?P<n_head>\d+)_E(?P<n_embd>\d+)_BS(?P<batch_size>\d+)_MI(?P<max_iters>\d+)"
    r"_D(?P<dropout>\d+(?:\.\d+)?(?:e-?\d+)?)_s(?P<seed>\d+)(?P<others>(?:_.*)?)",
    re.ASCII,
)
OTHERS = "|".join(sorted((name for name in FIELDS if name not in (*IN_PUBLISHED_NAME, "seed")), key=len, reverse=True))
HASH = re.compile(r"_[0-9a-f]{8}")  # at the end of a name that would be too long, or was taken


class Number(NamedTuple):
    value: float  # NaN where none is given
    unit: float  # of the last digit; 0 where it is unknown
    text: str  # empty where none is given


def one_line(cell: str) -> str:
    """Without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in cell).split())


def number(text: str, decimal_comma: bool = False, about: str = "", unit: str = "") -> Number:
    """A cell's; `about` is the measure, `unit` the loss's where it is none in nats. Raises UsageError where it is none."""
    word = text.lower()
    if word in NO_NUMBER:
        return Number(math.nan, 0.0, "")
    if word in NOT_FINITE:
        return Number(float(word), 0.0, text)
    plain = text.translate(str.maketrans(".,", ",.")) if decimal_comma else text
    if about in COUNTS:
        if re.fullmatch(THOUSANDS, plain):
            plain = re.sub(r"[,\u0020\u00a0\u202f'_]", "", plain)
        elif match := DURATION.fullmatch(plain):
            days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
            return Number(86400 * days + 3600 * hours + 60 * minutes + seconds, 0.0, text)
        elif plain[-1:].lower() in LETTERED and DECIMAL.fullmatch(plain[:-1]):
            plain = plain[:-1] + LETTERED[plain[-1].lower()]
    match = DECIMAL.fullmatch(plain)
    if not match:
        raise UsageError(f"{one_line(text)[:60]!r} is no number.")
    value, last = float(plain), float(f"1e{int(match[2] or 0) - len(match[1])}")
    if about == "parameters" and 0 < value < MILLIONS:
        return Number(value * 1e6, last * 1e6, text)
    if about in ("val_loss", "best_val_loss") and unit:
        if LOGARITHMS[unit] != "perplexity":
            return Number(value * math.log(2), last * math.log(2), text)
        return Number(math.log(value), last / value, text) if value > 0 else Number(math.nan, 0.0, text)
    return Number(value, last, text)


@lru_cache(maxsize=4096)
def setting_value(name: str, text: str, lenient: bool = False) -> Any:
    """A setting's value as data frames hold it: `none` as a word, None where the cell is empty. Raises UsageError at what is
    no value of it, but where it is `lenient`.
    """
    if not text:
        return None
    if name in ("corpus", "init_from"):
        text = one_line(text)
    elif re.fullmatch(r"\d+\.0", text):  # a whole number that a table wrote with a fraction
        text = text[:-2]
    try:
        value = check_value(name, text)
    except UsageError:
        if name == "tokenizer" and re.match("[A-Za-z]", text) and text.lower() not in (*NO_NUMBER, "nan"):
            return one_line(text).lower()  # other programs have others, and losses of other tokens are other losses
        if not lenient:
            raise
        return None
    return "none" if value is None else value


def named_settings(name: str) -> tuple[dict[str, Any], bool]:
    """(the settings in an experiment's name, whether one at its end was lost because the name was too long).

    None in any other name. Raises UsageError where such a name says an impossible value.
    """
    cut = len(name) >= LONGEST_NAME and HASH.fullmatch(name[-9:]) is not None
    match = NAME.fullmatch(name[:-9] if cut else name)
    pieces = re.split(rf"_(?=(?:{OTHERS})[=-])", match["others"]) if match else []
    if cut:
        pieces = pieces[:-1]
    elif pieces and not pieces[-1].startswith(("corpus", "init_from")):  # these may end in anything, others in no hash
        pieces[-1] = re.sub(f"{HASH.pattern}$", "", pieces[-1])
    if not match or "".join(pieces[:1]) or not all(re.fullmatch(r"[A-Za-z0-9._=+-]+", piece) for piece in pieces[1:]):
        return {}, False
    texts = {key: match[key] for key in (*IN_PUBLISHED_NAME, "seed")}
    texts["dropout"] = str(float(texts["dropout"]) / 100)
    try:
        experiment = Experiment(**texts)  # type: ignore[arg-type]  # it reads text as the setting's type
    except UsageError:
        return {}, False
    settings = {key: getattr(experiment, key) for key in texts}
    for piece in pieces[1:]:
        key, value = re.fullmatch(rf"({OTHERS})[=-](.*)", piece).groups()  # type: ignore[union-attr]  # they were split there
        settings[key] = setting_value(key, value or "none")
    return settings, cut


def factor_values(cells: Sequence[str], decimal_comma: bool) -> list[Any]:
    """Numbers where all are numbers, truths where all are, else texts; None where a cell is empty."""
    there = {cell for cell in cells if cell.lower() not in NO_NUMBER or cell.lower() == "none"}
    if there and {cell.lower() for cell in there} <= {"true", "false"}:
        return [cell.lower() == "true" if cell in there else None for cell in cells]
    texts = [one_line(cell)[:LONGEST_TEXT] or None for cell in cells]
    try:
        numbers = {cell: number(cell, decimal_comma).value for cell in there}
    except UsageError:
        return texts
    if not all(map(math.isfinite, numbers.values())):
        return texts
    whole = {cell: int(n) if n.is_integer() and abs(n) < 1e15 else n for cell, n in numbers.items()}
    return [whole.get(cell) for cell in cells]


def status_of(record: Mapping[str, Any], numbers: Mapping[str, Number]) -> tuple[str, str | None]:
    """(status, reason): as a column says, else by the validation loss, or the training loss where there is no other."""
    word = str(record.get("status") or "").strip()
    status = STATUSES.get(word.lower())
    if word.lower() in list(Status) and record.get("source") == OURS:
        return word.lower(), record.get("reason")
    if status not in (None, Status.FINISHED):
        return str(status), record.get("reason") or f"the table says {word}"
    loss = numbers["val_loss" if numbers["val_loss"].text else "train_loss"]
    if not loss.text:
        return "waiting", "the table gives no loss: it diverged, or did not finish"
    if not math.isfinite(loss.value):
        return "diverged", f"the table says {loss.text}"
    planned, made, interval = (record.get(key) or 0 for key in ("max_iters", "updates", "eval_interval"))
    if status is None and planned and made and made < min(EARLY * planned, planned - interval):
        return "failed", f"it stopped after {made:,.0f} of {planned:,} updates"
    return "finished", record.get("reason")
