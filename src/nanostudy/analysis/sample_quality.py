"""What models write, measured against the training text of their corpus.

Of a sample its prompt is left out, and what is cut: a word that touches the end (or goes on from the prompt), and of the
blocks, which blank lines separate, the first and the last. Shares are pooled over a model's samples.

words_real             of the words (letters, apostrophes inside), those that occur in the training text; case aside
speakers_real          of the speaker lines, those whose speaker has one in the training text; case counts
dialogue_well_formed   of the whole blocks, those that are a speaker line and then at least one line that is not blank
longest_copied         characters of the longest passage that stands word for word in the training text

A speaker line is the first line of a block, begins with a letter, and its only colon is its last character.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from nanostudy.analysis.frames import Results
from nanostudy.analysis.verbatim import longest_copied
from nanostudy.text import counted

SHARES = {"words_real": "words", "speakers_real": "speakers", "dialogue_well_formed": "blocks"}  # and what they are of
MEASURES = (*SHARES, "longest_copied")
COLUMNS = (*MEASURES, "characters", "samples", *SHARES.values())

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
BLANK = re.compile(r"\n(?:[^\S\n]*\n)+")  # what separates blocks
SPEAKER = re.compile(r"([^\W\d_][^\n:]*):")
BLOCK = re.compile(rf"{SPEAKER.pattern}(?:\n[^\n]*\S[^\n]*)+")
LEAST_BLOCKS, LEAST_SHARE = 10, 0.5  # of a text that counts as dialogue: blocks, and the well-formed share of them
LEAST_MODELS = 4  # for an interval of a rank correlation: its standard error divides by n - 3


@dataclass(frozen=True)
class Measured:
    """Counts over samples; the shares follow."""

    words: int = 0
    real_words: int = 0
    speakers: int = 0
    real_speakers: int = 0
    blocks: int = 0
    well_formed: int = 0
    characters: int = 0

    def __add__(self, other: Measured) -> Measured:
        return Measured(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def shares(self) -> dict[str, float]:
        """NaN where there is nothing that it is a share of."""
        pairs = ((self.real_words, self.words), (self.real_speakers, self.speakers), (self.well_formed, self.blocks))
        return {name: part / of if of else math.nan for name, (part, of) in zip(SHARES, pairs, strict=True)}


@dataclass(frozen=True)
class Reference:
    """What occurs in a training text."""

    text: str
    words: frozenset[str]
    speakers: frozenset[str]  # none where the text is no dialogue

    @staticmethod
    def of(text: str) -> Reference:
        blocks = [block for block in BLANK.split(text.strip("\n")) if block]
        found = [match[1] for match in map(BLOCK.fullmatch, blocks) if match]
        dialogue = len(blocks) >= LEAST_BLOCKS and len(found) >= LEAST_SHARE * len(blocks)
        words = frozenset(word.casefold() for word in WORD.findall(text))
        return Reference(text, words, frozenset(found) if dialogue else frozenset())

    def measure(self, sample: str, prompt: str = "") -> Measured:
        """Of one sample, which may or may not begin with its prompt."""
        text = sample.removeprefix(prompt).rstrip("\n")
        words = [word.casefold() for word in _whole_words(text, prompt)]
        counts = {"words": len(words), "real_words": sum(word in self.words for word in words), "characters": len(text)}
        if self.speakers:
            # without a prompt it goes on from a new line
            blocks = BLANK.split(text if prompt else f"\n{text}")[1:]
            opened = blocks[:-1] + [block for block in blocks[-1:] if "\n" in block]
            names = [match[1] for match in (SPEAKER.fullmatch(block.partition("\n")[0]) for block in opened) if match]
            counts |= {"speakers": len(names), "real_speakers": sum(name in self.speakers for name in names)}
            formed = sum(BLOCK.fullmatch(block) is not None for block in blocks[:-1])
            counts |= {"blocks": len(blocks[:-1]), "well_formed": formed}
        return Measured(**counts)


def _whole_words(text: str, prompt: str) -> Iterator[str]:
    goes_on = bool(prompt) and WORD.search(prompt[-1]) is not None
    for match in WORD.finditer(text):
        if match.end() < len(text) and not (match.start() == 0 and goes_on):
            yield match[0]


def quality(results: Results) -> pd.DataFrame:
    """COLUMNS of every experiment with samples; shares are NaN where they cannot be said, and attrs["notes"] tells why.

    attrs["of_the_text"] has the shares of the validation text itself, by its corpus' checksum: what a perfect model would get.
    """
    notes: list[str] = []
    texts = dict(_texts(results, notes))
    references = {sha: Reference.of(train) for sha, (train, _) in texts.items()}
    for sha, reference in references.items():
        if not reference.speakers:
            notes.append(f"{results.corpora[sha].name} is no dialogue, so speakers and dialogue are not measured.")
    shas = results.experiments["corpus_sha256"]
    groups = {str(name): group for name, group in results.samples.groupby("name", sort=False) if name in shas.index}
    order = [str(name) for name in results.experiments.index if name in groups]
    rows = {name: _row(groups[name], references.get(shas[name])) for name in order}
    without = sum(results.experiments["status"] == "finished") - len(rows)
    if without > 0:
        notes.append(f"{counted(without, 'finished experiment')} without a sample.")
    table = pd.DataFrame(
        list(rows.values()), columns=list(COLUMNS), index=pd.Index(list(rows), name="name", dtype=object)
    )
    for sha, reference in references.items():
        of_this = [name for name in rows if shas[name] == sha]
        table.loc[of_this, "longest_copied"] = _copied([groups[name] for name in of_this], reference.text)
    table.attrs["notes"] = notes
    table.attrs["of_the_text"] = {sha: references[sha].measure(val).shares() for sha, (_, val) in texts.items()}
    return table.astype(float)


def _texts(results: Results, notes: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """(checksum, (training text, validation text)) of the corpora that samples can be measured against."""
    sampled = results.experiments.index.isin(results.samples["name"])
    for sha in dict.fromkeys(results.experiments["corpus_sha256"][sampled]):
        facts = results.corpora.get(sha)
        parts = facts.parts() if facts else None
        if parts is None:
            named = facts.name if facts else "a text that is not named"
            notes.append(f"The text of {named} is not here, so what was written on it is not measured.")
        else:
            yield sha, parts


def _row(samples: pd.DataFrame, reference: Reference | None) -> dict[str, Any]:
    measured = Measured(characters=sum(len(text) for text in _bare(samples)))
    if reference:
        pairs = zip(samples["text"], samples["prompt"], strict=True)
        measured = sum((reference.measure(text, prompt) for text, prompt in pairs), Measured())
    counts = {name: getattr(measured, name) for name in ("characters", *SHARES.values())}
    return {**measured.shares(), "longest_copied": math.nan, **counts, "samples": len(samples)}


def _bare(samples: pd.DataFrame) -> list[str]:
    pairs = zip(samples["text"], samples["prompt"], strict=True)
    return [text.removeprefix(prompt).rstrip("\n") for text, prompt in pairs]


def _copied(groups: Sequence[pd.DataFrame], source: str) -> list[int]:
    texts = [_bare(group) for group in groups]
    lengths = iter(longest_copied([text for group in texts for text in group], source))
    return [max(next(lengths) for _ in group) for group in texts]


# --- against the loss


def quality_against_loss(results: Results, table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each measure with the validation loss over finished experiments: rho, low, high, n.

    The 95% interval is Fisher's, with the standard error of Bonett & Wright (2000). Models of one corpus alone are compared:
    the one with the most. Fewer than LEAST_MODELS, or a measure that is the same everywhere: NaN.
    """
    finished = results.finished
    shas = finished["corpus_sha256"][finished.index.isin(table.index)]
    most = shas.mode()
    names = list(shas.index[shas == most.iloc[0]]) if len(most) else []
    losses = finished.loc[names, "val_loss"].to_numpy()
    rows = [rank_correlation(table.loc[names, measure].to_numpy(), losses) for measure in MEASURES]
    index = pd.Index(MEASURES, name="measure", dtype=object)
    return pd.DataFrame(rows, columns=["rho", "low", "high", "n"], index=index)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """rho, its 95% interval, and n, over the pairs that are known; NaN where it cannot be said."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y, n = x[known], y[known], int(known.sum())
    nothing = {"rho": math.nan, "low": math.nan, "high": math.nan, "n": n}
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return nothing
    rho = float(stats.spearmanr(x, y).statistic)
    if n < LEAST_MODELS:
        return nothing | {"rho": rho}
    # Of equal ranks Fisher's z is infinite: the interval is that of the next value, where two neighbours change places.
    within = max(-1.0, min(1.0, rho)) if abs(rho) < 1 - 1e-12 else math.copysign(1 - 12 / (n * (n * n - 1)), rho)
    half = float(stats.norm.ppf(0.975)) * math.sqrt((1 + within**2 / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(within) + side * half) for side in (-1, 1))
    return nothing | {"rho": rho, "low": min(low, rho), "high": max(high, rho)}
