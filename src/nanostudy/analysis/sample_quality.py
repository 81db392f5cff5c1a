"""How good samples are: measures of what models write, against the training text of their corpus.

A sample counts without its prompt and without what is cut: a word that touches the end (or continues the prompt), and the first and
the last of the blocks, which blank lines separate. Shares are pooled over a model's samples; each has its n and a 95% interval.

words_real             share of the words (letters, apostrophes inside) that occur in the training text; case aside
speakers_real          share of the speaker lines whose speaker has one in the training text; case counts
dialogue_well_formed   share of the whole blocks that are a speaker line and then at least one line that is not blank
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
from nanostudy.analysis.verbatim import longest_verbatim
from nanostudy.text import counted

# a share, and its whole
SHARES = {"words_real": "words", "speakers_real": "speakers", "dialogue_well_formed": "blocks"}
MEASURES = (*SHARES, "longest_copied")
ENDS = tuple(f"{share}_{end}" for share in SHARES for end in ("low", "high"))  # of the shares' 95% intervals
QUALITY = (*MEASURES, "characters", "samples", *SHARES.values(), *ENDS)
FEWEST_SAMPLES = 3  # of one model, to see that shares differ between its samples

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
BLANK = re.compile(r"\n(?:[^\S\n]*\n)+")  # what separates blocks
SPEAKER = re.compile(r"([^\W\d_][^\n:]*):")
BLOCK = re.compile(rf"{SPEAKER.pattern}(?:\n[^\n]*\S[^\n]*)+")
LEAST_BLOCKS, LEAST_SHARE = 10, 0.5  # blocks, and the well-formed share of them, of a text that counts as dialogue
LEAST_MODELS = 4  # for the interval of a rank correlation: its standard error divides by n - 3


@dataclass(frozen=True)
class QualityCounts:
    """Counts over samples; the shares follow."""

    words: int = 0
    real_words: int = 0
    speakers: int = 0
    real_speakers: int = 0
    blocks: int = 0
    well_formed: int = 0
    characters: int = 0

    def __add__(self, other: QualityCounts) -> QualityCounts:
        return QualityCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def pairs(self) -> dict[str, tuple[int, int]]:
        """The part and the whole of each share."""
        pairs = ((self.real_words, self.words), (self.real_speakers, self.speakers), (self.well_formed, self.blocks))
        return dict(zip(SHARES, pairs, strict=True))

    def shares(self) -> dict[str, float]:
        """NaN where the whole is 0."""
        return {name: part / whole if whole else math.nan for name, (part, whole) in self.pairs().items()}


def share_interval(parts: Sequence[int], wholes: Sequence[int]) -> tuple[float, float]:
    """The 95% interval of a share that is pooled over samples: Wilson's (1927). NaN where the whole is 0.

    What one sample holds may be alike. Where the shares of FEWEST_SAMPLES or more differ by more than chance, n is divided by the
    design effect (Kish, 1965, Survey sampling, section 8.2).
    """
    part, whole = np.array(parts, dtype=float), np.array(wholes, dtype=float)
    part, whole = part[whole > 0], whole[whole > 0]
    n, samples = float(whole.sum()), len(whole)
    if not n:
        return math.nan, math.nan
    share, z = float(part.sum()) / n, float(stats.norm.ppf(0.975))
    if samples >= FEWEST_SAMPLES and 0 < share < 1:
        between = samples / (samples - 1) * float(np.square(part - share * whole).sum()) / n**2
        n /= max(1.0, between / (share * (1 - share) / n))
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((centre + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)  # rounding


@dataclass(frozen=True)
class Reference:
    """What occurs in a training text."""

    text: str
    words: frozenset[str]
    speakers: frozenset[str]  # empty where the text is no dialogue

    @staticmethod
    def of(text: str) -> Reference:
        blocks = [block for block in BLANK.split(text.strip("\n")) if block]
        speakers = [match[1] for match in map(BLOCK.fullmatch, blocks) if match]
        dialogue = len(blocks) >= LEAST_BLOCKS and len(speakers) >= LEAST_SHARE * len(blocks)
        words = frozenset(word.casefold() for word in WORD.findall(text))
        return Reference(text, words, frozenset(speakers) if dialogue else frozenset())

    def measure(self, sample: str, prompt: str = "") -> QualityCounts:
        """One sample, which may or may not begin with its prompt."""
        text = sample.removeprefix(prompt).rstrip("\n")
        words = [word.casefold() for word in _whole_words(text, prompt)]
        counts = {"words": len(words), "real_words": sum(word in self.words for word in words), "characters": len(text)}
        if self.speakers:
            # without a prompt it continues a new line
            blocks = BLANK.split(text if prompt else f"\n{text}")[1:]
            opened = blocks[:-1] + [block for block in blocks[-1:] if "\n" in block]
            names = [match[1] for match in (SPEAKER.fullmatch(block.partition("\n")[0]) for block in opened) if match]
            counts |= {"speakers": len(names), "real_speakers": sum(name in self.speakers for name in names)}
            formed = sum(BLOCK.fullmatch(block) is not None for block in blocks[:-1])
            counts |= {"blocks": len(blocks[:-1]), "well_formed": formed}
        return QualityCounts(**counts)


def _whole_words(text: str, prompt: str) -> Iterator[str]:
    continues = bool(prompt) and WORD.search(prompt[-1]) is not None
    for match in WORD.finditer(text):
        if match.end() < len(text) and not (match.start() == 0 and continues):
            yield match[0]


def quality(results: Results) -> pd.DataFrame:
    """Columns QUALITY, a row per experiment with samples; shares are NaN where they cannot be measured, and attrs["notes"] says why.

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
    rows = [_row(groups[name], references.get(shas[name])) for name in order]
    without = sum(results.experiments["status"] == "finished") - len(rows)
    if without > 0:
        notes.append(f"{counted(without, 'finished experiment')} without a sample.")
    table = pd.DataFrame(rows, columns=list(QUALITY), index=pd.Index(order, name="name", dtype=object))
    for sha, reference in references.items():
        names = [name for name in order if shas[name] == sha]
        table.loc[names, "longest_copied"] = _longest_copied([groups[name] for name in names], reference.text)
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
            name = facts.name if facts else "a text without a name"
            notes.append(f"The text of {name} is not here, so samples of its models are not measured.")
        else:
            yield sha, parts


def _row(samples: pd.DataFrame, reference: Reference | None) -> dict[str, Any]:
    each = [QualityCounts(characters=len(text)) for text in _without_prompts(samples)]
    if reference:
        each = [
            reference.measure(text, prompt) for text, prompt in zip(samples["text"], samples["prompt"], strict=True)
        ]
    counts = sum(each, QualityCounts())
    numbers = {name: getattr(counts, name) for name in ("characters", *SHARES.values())}
    ends = [end for share in SHARES for end in share_interval(*zip(*(one.pairs()[share] for one in each), strict=True))]
    intervals = dict(zip(ENDS, ends, strict=True))
    return {**counts.shares(), "longest_copied": math.nan, **numbers, "samples": len(samples), **intervals}


def _without_prompts(samples: pd.DataFrame) -> list[str]:
    pairs = zip(samples["text"], samples["prompt"], strict=True)
    return [text.removeprefix(prompt).rstrip("\n") for text, prompt in pairs]


def _longest_copied(groups: Sequence[pd.DataFrame], source: str) -> list[int]:
    """Of each model's samples."""
    texts = [_without_prompts(group) for group in groups]
    lengths = iter(longest_verbatim([text for group in texts for text in group], source))
    return [max(next(lengths) for _ in group) for group in texts]


# --- against the loss


def quality_against_loss(results: Results, table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each measure with the validation loss over finished experiments: rho, low, high, n.

    The 95% interval is Fisher's, with the standard error of Bonett & Wright (2000). It compares models of one corpus alone, the one
    with the most. NaN with fewer than LEAST_MODELS, or where the measure is the same everywhere.
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
    """rho, its 95% interval, and n, over the finite pairs; NaN where there are too few or all are alike."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y, n = x[finite], y[finite], int(finite.sum())
    nothing = {"rho": math.nan, "low": math.nan, "high": math.nan, "n": n}
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return nothing
    rho = float(stats.spearmanr(x, y).statistic)
    if n < LEAST_MODELS:
        return nothing | {"rho": rho}
    # Fisher's z of equal ranks is infinite: the interval is that of the next value, where two neighbours change places
    within = max(-1.0, min(1.0, rho)) if abs(rho) < 1 - 1e-12 else math.copysign(1 - 12 / (n * (n * n - 1)), rho)
    half = float(stats.norm.ppf(0.975)) * math.sqrt((1 + within**2 / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(within) + side * half) for side in (-1, 1))
    return nothing | {"rho": rho, "low": min(low, rho), "high": max(high, rho)}
