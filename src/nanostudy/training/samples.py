"""The texts that a trained model wrote, beside its weights: samples.json, and sample.txt for a person."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanostudy.atomic import write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.training.run_folder import FILES, read_bounded

SAMPLES, TEXT = "samples.json", "sample.txt"
OPENING = "--- "  # begins the line above each of several samples in sample.txt, which names its prompt


@dataclass(frozen=True)
class Sample:
    """The prompt and what the model wrote after it, and how. Older versions kept the text alone."""

    prompt: str | None
    text: str
    tokens: int | None = None  # written
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def write_samples(folder: Path, samples: Sequence[Sample], headings: bool) -> None:
    """sample.txt names the prompts where `headings` asks for it; it comes last, and so says that all is there."""
    content = json.dumps([asdict(sample) for sample in samples], indent=1)
    write_atomically(folder / SAMPLES, content + "\n")
    write_atomically(folder / TEXT, _text(samples, headings))


def _text(samples: Sequence[Sample], headings: bool) -> str:
    pieces = [f"{OPENING}{s.prompt or 'no prompt'}\n{s.text}\n" if headings else f"{s.text}\n" for s in samples]
    return "\n".join(pieces)


def read_samples(folder: Path, prompt: str | None = None, prompts: Sequence[Sequence[str | None]] = ()) -> list[Sample]:
    """A run folder's samples. Raises NanostudyError where they are damaged.

    Older versions wrote sample.txt alone: one text that goes on from `prompt`, or several, from one of the lists of prompts.
    """
    path = folder / (SAMPLES if os.path.lexists(folder / SAMPLES) else TEXT)
    if not os.path.lexists(path):
        return []
    try:
        if path.name == TEXT:
            return _from_text(read_bounded(path, FILES[TEXT].most).decode(errors="replace"), prompt, prompts)
        samples = [Sample(**sample) for sample in json.loads(read_bounded(path, FILES[SAMPLES].most))]
        texts = [_text(samples, headings) for headings in (True, False)]
        if read_bounded(folder / TEXT, FILES[TEXT].most).decode() not in texts:
            raise ValueError(f"{TEXT} says otherwise")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise NanostudyError(f"{path} is damaged or cannot be read ({problem}). Restore or delete it.") from None
    return samples


def _from_text(text: str, prompt: str | None, asked: Sequence[Sequence[str | None]]) -> list[Sample]:
    """Split at the lines that name the prompts; a model may have written such lines itself."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for prompts in asked:
        begins = (f"{re.escape(OPENING + (p or 'no prompt'))}\n({re.escape(p or '')}.*?)" for p in prompts)
        match = re.fullmatch("\n\n".join(begins) + "\n?", text, re.DOTALL)
        if match:
            return [Sample(*one) for one in zip(prompts, match.groups(), strict=True)]
    first, *pieces = re.split(rf"^{re.escape(OPENING)}(.*)\n", text, flags=re.MULTILINE)
    if first.strip() or not pieces:
        return [Sample(prompt, text.removesuffix("\n"))]
    named = zip(pieces[::2], pieces[1::2], strict=True)
    return [Sample(None if name == "no prompt" else name, piece.rstrip("\n")) for name, piece in named]
