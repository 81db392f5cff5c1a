"""The commands that take models and texts to other programs, and back."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

import nanostudy
from nanostudy.cli.options import Corpus, Overwrite, Tokenizer
from nanostudy.errors import UsageError


def convert(
    source: Annotated[Path, typer.Argument(help="A run folder or weights file; or a ckpt.pt of nanoGPT's.")],
    to: Annotated[str, typer.Option(help="nanogpt or huggingface; for a ckpt.pt, the new run folder.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(help="For a ckpt.pt: setting=value ..., such as max_iters=5000 or corpus=TEXT."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write. Default: nanogpt or huggingface inside the run.")
    ] = None,
    which: Annotated[
        str | None, typer.Option(help="best or last weights. Default: last for nanogpt, best for huggingface.")
    ] = None,
    meta: Annotated[
        Path | None, typer.Option(help="For a ckpt.pt: its meta.pkl. Default: beside it, or in data/DATASET.")
    ] = None,
    characters: Annotated[
        str | None, typer.Option(help="For a ckpt.pt without meta.pkl: a corpus or text with exactly its characters.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Take a run to nanoGPT or Hugging Face, or make a run of nanoGPT's ckpt.pt."""
    from nanostudy.settings_files import parse_assignments

    settings: dict[str, Any] = {**parse_assignments(assignments or [])}
    files: dict[str, Any] = {"out": out, "which": which, "meta": meta, "characters": characters, "overwrite": overwrite}
    for name in settings.keys() & files.keys():
        raise UsageError(f"{name} is no setting but an option: write --{name}.")
    done = nanostudy.convert(source, to, **files, **settings)
    print(f"folder   {done.folder}")
    for note in done.notes:
        print(note)
    print(_next_steps(done.folder, to, done.dataset))


def _next_steps(folder: Path, to: str, dataset: str | None) -> str:
    if to == "huggingface":
        return f"use      AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    if to != "nanogpt":
        return f"more     nanostudy sample {shlex.quote(str(folder))}"
    place = shlex.quote(str(folder.resolve()))
    return (
        f"In nanoGPT's folder, with {folder / 'meta.pkl'} in data/{dataset} (and train.bin and val.bin, to go on: "
        "`nanostudy corpus export` writes all three):\n"
        f"sample   python sample.py --out_dir={place}\n"
        f"go on    python train.py {place}/resume.py --out_dir={place} --max_iters=..."
    )


def corpus_export(
    name: Corpus,
    out: Annotated[Path, typer.Option(help="The folder to write, such as nanoGPT/data/NAME.")],
    tokenizer: Tokenizer = "char",
    overwrite: Overwrite = False,
) -> None:
    """Write a corpus as nanoGPT's dataset folder: train.bin, val.bin and meta.pkl."""
    from nanostudy.atomic import whole_folder
    from nanostudy.data.corpus import load_corpus
    from nanostudy.data.nanogpt_dataset import write_dataset

    corpus = load_corpus(name, tokenizer)
    if corpus.note:
        print(f"NOTE: {corpus.note}")
    with whole_folder(out, overwrite) as folder:
        written = write_dataset(folder, corpus.train.tokens, corpus.val.tokens, corpus.tokenizer)
    for path in written:
        print(out / path.name)
