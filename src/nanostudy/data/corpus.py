"""A corpus: a text with its checksum, tokenizer, split and fixed evaluation windows."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from nanostudy.data.texts import cuts_of, find_text, split_checksum
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.errors import UsageError

LABELS = {"train": "training", "val": "validation", "test": "test"}  # of splits


@dataclass(frozen=True)
class Split:
    """Token ids in the smallest unsigned type, the number of their characters, and the text's true entropy if it is known."""

    tokens: np.ndarray
    characters: int
    entropy: float | None  # nats per character

    @property
    def characters_per_token(self) -> float:
        return self.characters / len(self.tokens)

    def bits_per_character(self, loss: float) -> float:
        """Converts a mean loss in nats per token."""
        return loss / self.characters_per_token / math.log(2)


@dataclass(frozen=True)
class Corpus:
    requested: str
    name: str
    sha256: str
    note: str | None  # for a person, for example that another text stands in
    tokenizer: Tokenizer
    train: Split
    val: Split
    test: Split | None = None  # held out: no training and no choice reads it

    @property
    def splits(self) -> dict[str, Split]:
        """By the names "train", "val" and, where there is one, "test"."""
        return {"train": self.train, "val": self.val, **({"test": self.test} if self.test else {})}

    def check_window(self, block_size: int) -> None:
        """Raises UsageError where a split is shorter than one window and the token after it."""
        for name, split in self.splits.items():
            label = LABELS[name]
            if len(split.tokens) <= block_size:
                raise UsageError(
                    f"The {label} split of {self.name} has {len(split.tokens)} tokens, and one window of block_size="
                    f"{block_size} needs {block_size + 1}. Take a longer text or a smaller block_size."
                )

    def as_dict(self) -> dict[str, object]:
        """The corpus as run.json records it."""
        return {
            "requested": self.requested,
            "name": self.name,
            "sha256": self.sha256,
            "note": self.note,
            "tokenizer": self.tokenizer.as_dict(),
            **{
                label: {"tokens": len(s.tokens), "characters": s.characters, "entropy_nats_per_character": s.entropy}
                for label, s in self.splits.items()
            },
        }


def load_corpus(requested: str, tokenizer: str | Tokenizer = "char", split: str | None = None) -> Corpus:
    """A named corpus, or the file or folder at a path. A given Tokenizer must know all characters of the text.

    `split` has the shares of the parts, as Experiment.split. Raises UsageError.
    """
    text = find_text(requested, tokenizer if isinstance(tokenizer, str) else tokenizer.kind)
    if not text.content:
        raise UsageError(f"The text {text.name} is empty.")
    if isinstance(tokenizer, str):
        if text.tokenizer and text.tokenizer.kind != tokenizer:
            raise UsageError(
                f"The tokens of {requested} are made with tokenizer={text.tokenizer.kind}, not {tokenizer}."
            )
        tokenizer = text.tokenizer or Tokenizer.of(tokenizer, text.content)
    else:
        try:
            tokenizer.encode(text.content)
        except UsageError as problem:
            raise UsageError(f"{text.name} has characters that the model does not know. {problem}") from None
    cuts = cuts_of(text, split)
    sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
    if min(sizes) < 1:
        parts = ", ".join(f"{label} {size}" for label, size in zip(LABELS.values(), sizes, strict=False))
        raise UsageError(
            f"The text {text.name} is too short: of its {len(text.content)} characters the splits get {parts}."
        )
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    splits = []
    for start, stop in itertools.pairwise(cuts):
        entropy = None if text.nats is None else float(text.nats[start:stop].mean())
        splits.append(Split(tokenizer.encode(text.content[start:stop]).astype(dtype), stop - start, entropy))
    return Corpus(requested, text.name, split_checksum(text, cuts), text.note, tokenizer, *splits)


def window_starts(corpus: Corpus, split: str, context: int, tokens: int | None = None) -> np.ndarray:
    """Where the fixed windows of an evaluation start, int64: consecutive ones, without randomness.

    Those of "val" and "test" cover their whole split: each token but the first is a target once, and the end of the text may
    cut the last one short. "train" takes as many windows as "val", evenly spread over the training split. With `tokens`, both
    take only so many windows as hold about so many, evenly spread.
    """
    available = {name: np.arange(0, len(one.tokens) - 1, context) for name, one in corpus.splits.items()}
    count = min(len(available["train"]), len(available["val"])) if split == "train" else len(available[split])
    count = count if tokens is None else min(count, -(-tokens // context))
    return available[split][np.arange(count) * len(available[split]) // count]
