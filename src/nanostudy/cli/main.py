"""The commands: parse, call, print."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

import nanostudy
from nanostudy.cli.convert import convert, corpus_export
from nanostudy.cli.judge import judge
from nanostudy.cli.options import (
    Corpus,
    Factors,
    Loss,
    Name,
    Tokenizer,
    columns,
    presets_like,
    print_paragraph,
    stopped_at_once,
)
from nanostudy.cli.sample import sample
from nanostudy.cli.study import app as study_app
from nanostudy.cli.ui import ui
from nanostudy.errors import Interrupted, NanostudyError, ReportedElsewhere, UsageError
from nanostudy.settings import BESIDE, CORPORA, IN_FILES, SETTINGS
from nanostudy.text import beside, printable, value_text
from nanostudy.version import VERSION

if TYPE_CHECKING:
    from nanostudy.run import Run
    from nanostudy.settings import Experiment

PRINTING_COMMANDS = {"status", "list", "plan", "sample", "presets", "settings", "show", "doctor"}
LONGEST_NAME = 80  # characters of a folder's name
BEGINNING = 800  # characters of a text in which a prompt is looked for

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A laboratory for small GPTs: train one or a whole study, sample, report.",
)
corpus_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The texts to train on.")
app.add_typer(study_app, name="study")
app.add_typer(corpus_app, name="corpus")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nanostudy {VERSION}")
        raise typer.Exit


@app.callback()
def check_ranks(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    """Only a training is done by several processes together."""
    # WORLD_SIZE alone is set by others too, in each of several machines
    if context.invoked_subcommand == "train" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    from nanostudy.model.ranks import started

    ranks = started()
    if not ranks.first:
        raise ReportedElsewhere("Rank 0 reports what is wrong.")
    if ranks.count > 1:
        raise UsageError(
            f"nanostudy {context.invoked_subcommand} is one process, and torchrun started {ranks.count}. Call it without "
            "torchrun; `nanostudy study run` finds workers for all cores and GPUs by itself."
        )


@app.command(context_settings={"ignore_unknown_options": True})  # --setting=value is a setting
def train(
    source: Annotated[
        str,
        typer.Argument(
            help="A preset, a settings file (YAML), a configuration of nanoGPT's (.py), or a run folder to go on with.",
            autocompletion=presets_like,
        ),
    ],
    assignments: Annotated[
        list[str] | None, typer.Argument(help="setting=value or --setting=value ... (nanostudy settings lists them)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/ and a name.")] = None,
) -> None:
    """Train one GPT; run the same command again to go on after an interruption."""
    from nanostudy.model.ranks import joined
    from nanostudy.training.run_folder import read_metadata

    with joined() as ranks:
        settings, out = ranks.of_first(lambda: _requested(source, assignments or [], out))
        before = read_metadata(out) if ranks.first else None
        with stopped_at_once():
            run = nanostudy.train(settings, out)
    if not ranks.first:
        return
    if before and before["status"] == run.metadata["status"]:
        print(f"{out} is finished already, and a result is never changed; --out trains in another folder.")
    _print_finished(run)


def _requested(source: str, assignments: list[str], out: Path | None) -> tuple[dict[str, Any], Path]:
    """The settings and the run folder; prints what of nanoGPT's settings is not used."""
    from nanostudy.interop.nanogpt_config import read_config
    from nanostudy.settings_files import experiment_and_resources, parse_assignments, read_settings

    given = parse_assignments(assignments)
    if source.endswith(".py"):
        config = read_config(Path(source), given)
        print(f"config   {source}, read and not executed; what it does not set is as in nanoGPT's train.py")
        for note in config.notes:
            print(f"read     {note}")
        for name, value, reason in config.unused:
            print(f"unused   {name} = {value}: {reason}")
        settings, out = config.settings, out or config.out
    else:
        settings = {**read_settings(source), **given}
    experiment, _ = experiment_and_resources(settings)
    return settings, out or _default_folder(source, given, experiment)


def _default_folder(source: str, given: dict[str, str], experiment: Experiment) -> Path:
    """The run folder that was named, or one under runs/ named after the request. Raises UsageError where a run's text is missing or
    another one is given.
    """
    from nanostudy.training.inputs import Inputs
    from nanostudy.training.run_folder import read_metadata

    path = Path(source)
    given = {key: value for key, value in given.items() if key not in BESIDE}
    folder = path.parent if path.name == "settings.yaml" else path
    run = read_metadata(folder)
    if run and not given:
        if experiment.corpus not in CORPORA and not Path(experiment.corpus).exists():
            raise UsageError(
                f"{folder} was trained on {experiment.corpus}, which is not there, and neither {folder} nor a folder above it "
                f"has it. Name the text: nanostudy train {shlex.quote(source)} corpus=PATH"
            )
        return folder
    if run and set(given) == {"corpus"}:
        text = Inputs().corpus(experiment)
        if text.sha256 == run["corpus"].get("sha256"):
            return folder
        raise UsageError(
            f"corpus={given['corpus']} is another text than {folder} was trained on (SHA-256 {text.sha256[:12]}..., not "
            f"{str(run['corpus'].get('sha256'))[:12]}...). Add --out to begin a new run on it."
        )
    request = "-".join([path.stem or path.name, *(f"{key}={value}" for key, value in given.items())])
    name = re.sub(r"[^\w.=,+-]+", "_", request)
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(request.encode()).hexdigest()[:8]}"
    return Path("runs") / name


def _print_finished(run: Run) -> None:
    metadata = run.metadata
    if metadata["status"] == "diverged":
        print(f"This run diverged: {metadata['diverged']}. Its best weights are kept in {run.folder}.")
        raise typer.Exit(1)
    final, best = metadata["final"], metadata["best"]
    print(
        f"final    train {final['train_loss']:.4f}   val {final['val_loss']:.4f} nats per token (best val {best['val_loss']:.4f})"
    )
    print(f"sample   {run.folder / 'sample.txt'}\n")
    print("\n".join((run.folder / "sample.txt").read_text(encoding="utf-8").splitlines()[:12]))
    print(f"\nreport   {run.folder / 'report.md'}")
    print(f"more     nanostudy sample {shlex.quote(str(run.folder))}{_prompt_option(run)}")


def _prompt_option(run: Run) -> str:
    """With the first words of the run's text, whose characters the model knows; empty where the text is no longer there."""
    from nanostudy.data.texts import find_text

    try:
        text = find_text(run.experiment.corpus, run.weights.tokenizer.kind).content
    except NanostudyError:
        return ""
    words = re.search(r"[^\W\d_].{0,19}(?=\W|$)", text[:BEGINNING], re.MULTILINE)
    return f" --prompt {shlex.quote(words[0].rstrip())}" if words and words[0].isprintable() else ""


@app.command()
def report(
    paths: Annotated[
        list[Path], typer.Argument(help="Studies (folders or names), run folders, tables of results; one or several.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: report in the study or run, or here for several.")
    ] = None,
    loss: Loss = "",
    name: Name = "",
    factors: Factors = "",
) -> None:
    """Report on a study, or on several runs or tables: a page to open, Markdown, a table, figures. Also while it runs."""
    from nanostudy import api

    written = api.published(*paths, out=out, **columns(loss, name, factors))
    said = written.document
    for note in [*said.notes, *([] if said.answer else [said.lede])]:
        print_paragraph(note)
    for number, (about, text) in enumerate(said.answer.items(), start=1):
        print(f"{number}  {about}")
        print_paragraph(text, "   ")
    print(f"page     {written.page}")
    for path in written.beside:
        print(f"{'beside' if path == written.beside[0] else '':9}{path}")
    if written.undrawn:
        print(f"Figures could not be drawn here: {written.undrawn}", file=sys.stderr)
    else:
        print(f"figures  {written.figures}, as PNG and SVG, in {written.folder}")


app.command(context_settings={"ignore_unknown_options": True})(convert)
app.command()(judge)
app.command()(sample)
app.command()(ui)


@app.command()
def presets() -> None:
    """List the presets."""
    from nanostudy.settings_files import preset_names, preset_text

    texts = [(name, preset_text(name).splitlines()[0].removeprefix("# ")) for name in preset_names()]
    print("\n".join(beside(texts)))


@app.command()
def settings() -> None:
    """List every setting with its default and meaning."""
    rows = [(name, value_text(SETTINGS[name].default), SETTINGS[name].meaning) for name in IN_FILES]
    print("\n".join(beside(rows)))


@corpus_app.command("list")
def corpus_list() -> None:
    """Name the corpora, and where shakespeare lies."""
    from nanostudy.data.texts import NAMES, locate_shakespeare

    paths = [
        ("FILE", "any UTF-8 text, by its path"),
        ("FOLDER", "train.bin, val.bin and meta.pkl, as nanoGPT prepares them, by its path"),
    ]
    print("\n".join(beside([*NAMES.items(), *paths])))
    print(f"\nshakespeare is {locate_shakespeare() or 'not on this machine yet'}")


@corpus_app.command("show")
def corpus_show(name: Corpus, tokenizer: Tokenizer = "char") -> None:
    """A corpus's sizes, checksum, entropy where known, and first lines."""
    from nanostudy.data.corpus import LABELS, load_corpus

    corpus = load_corpus(name, tokenizer)
    if corpus.note:
        print(f"NOTE: {corpus.note}")
    print(f"{corpus.name}   SHA-256 {corpus.sha256}")
    print(f"tokenizer    {corpus.tokenizer.kind}, {corpus.tokenizer.vocab_size} tokens")
    for name, split in corpus.splits.items():
        label = LABELS[name]
        entropy = "" if split.entropy is None else f", true entropy {split.entropy:.4f} nats per character"
        print(f"{label:13}{split.characters:,} characters, {len(split.tokens):,} tokens{entropy}")
    print("\n" + corpus.tokenizer.decode(corpus.train.tokens[:400]))


corpus_app.command("export")(corpus_export)


@corpus_app.command("fetch")
def corpus_fetch(name: Annotated[str, typer.Argument(help="shakespeare")]) -> None:
    """Put a corpus on this machine."""
    from nanostudy.data.texts import fetch_shakespeare, find_text

    if name != "shakespeare":
        raise UsageError(f"{name!r} needs no fetching; shakespeare does.")
    find_text(name)  # checks it, wherever it lies
    print(fetch_shakespeare())


@app.command()
def doctor() -> None:
    """What this machine offers, and what training would use and why."""
    from nanostudy.doctor import examine

    print("\n".join(beside(list(examine()))))


class Output:
    """A standard stream for which nothing is a reason to stop: neither a character that the console cannot show, nor a full disk,
    a closed pipe or a closed terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.problem: OSError | None = None  # the first one
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as problem:
            self._give_up(problem)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as problem:
            self._give_up(problem)

    def _give_up(self, problem: OSError) -> None:
        self.problem = self.problem or problem
        with contextlib.suppress(OSError, ValueError):  # what follows, and what is in buffers, goes nowhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def _lenient_output() -> Iterator[None]:
    """Where a command's whole result is what it prints, and that could not be written, the exit code is 1."""
    before = sys.stdout, sys.stderr
    outputs = [Output(stream or io.StringIO()) for stream in before]  # none where they were closed
    sys.stdout, sys.stderr = outputs
    try:
        yield
    finally:
        for output in outputs:
            output.flush()
        sys.stdout, sys.stderr = before
        lost = outputs[0].problem
        if lost and lost.errno not in (errno.EPIPE, errno.EIO):
            print(f"nanostudy: what it prints could not be written: {lost.strerror}", file=outputs[1])
            if PRINTING_COMMANDS.intersection(sys.argv[1:3]):
                sys.exit(1)


def _wrapped(message: str) -> str:
    """Between words where it is for a terminal."""
    if not sys.stderr.isatty():
        return message
    width = shutil.get_terminal_size().columns
    lines = (textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in message.split("\n"))
    return "\n".join(chain.from_iterable(lines))


def main() -> None:
    """Runs a command. A person's mistake ends in a message and exit code 2, a failure in 1, a stop on request in 130."""
    try:
        with _lenient_output():
            try:
                app()
            except NanostudyError as problem:
                if not isinstance(problem, ReportedElsewhere):
                    print(_wrapped(f"nanostudy: {printable(str(problem))}"), file=sys.stderr)
                sys.exit(2 if isinstance(problem, UsageError) else 130 if isinstance(problem, Interrupted) else 1)
            except OSError as problem:  # such as a name longer than the file system takes
                print(f"nanostudy: {problem.filename or 'a file'}: {problem.strerror or problem}.", file=sys.stderr)
                sys.exit(1)
    except SystemExit as end:
        # a rank that lost others has threads that wait for them, which would abort the process at its end
        distributed = sys.modules.get("torch.distributed")
        if "TORCHELASTIC_RUN_ID" in os.environ and distributed and distributed.is_initialized():
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


if __name__ == "__main__":
    main()
