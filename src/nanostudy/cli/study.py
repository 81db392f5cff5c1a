"""The commands of `nanostudy study`: parse, call, print."""

from __future__ import annotations

import contextlib
import shlex
import sys
import textwrap
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nanostudy
from nanostudy.cli.options import (
    FOLDER,
    RUN,
    Axes,
    Difference,
    Factors,
    Folder,
    Form,
    Format,
    Json,
    Layout,
    Loss,
    Name,
    Only,
    Out,
    Part,
    Source,
    columns,
    options,
    print_paragraph,
    report_width,
    show,
    stopped_at_once,
    studies_like,
)
from nanostudy.cli.plan import prediction_record, print_plan, stack_records
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.settings import PLAN_OPTIONS
from nanostudy.text import beside, duration, printable

if TYPE_CHECKING:
    from nanostudy.result import Result


Report = Annotated[bool, typer.Option("--report/--no-report", help="Write the page at the end.")]
Open = Annotated[bool, typer.Option("--open", help="Open the page in a browser at the end.")]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Many experiments as one job.")


@app.command("run")
@options(RUN)
def run_command(
    source: Source,
    axes: Axes = None,
    out: Out = None,
    part: Part = None,
    only: Only = None,
    report: Report = True,
    open_page: Open = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", hidden=True)] = False,
    ui: Annotated[bool, typer.Option("--ui", help="Show it in a browser while it runs (nanostudy ui).")] = False,
    **given: Any,
) -> None:
    """Run a study; run the same command again to go on after an interruption."""
    from nanostudy.settings_files import parse_assignments
    from nanostudy.study.definition import folder_of

    if dry_run:
        words = shlex.join([source, *(axes or [])])
        raise UsageError(f"--dry-run: `nanostudy study plan {words}` says what this would do and runs nothing.")
    path, settings = out or folder_of(source), parse_assignments(axes or [])
    with _shown(path) if ui else contextlib.nullcontext():
        chosen: dict[str, Any] = {"settings": settings, "parts": part or [], "only": only}
        _run(lambda: nanostudy.run_study(source, path, **chosen, **given), path, report, open_page)


@app.command("retry")
@options(RUN)
def retry_command(
    folder: Folder,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Experiments that failed, or whose run folders are lost or damaged. Default: all."),
    ] = None,
    report: Report = True,
    open_page: Open = False,
    **given: Any,
) -> None:
    """Run experiments again that failed, or whose run folders are lost or damaged."""
    _run(lambda: nanostudy.retry_study(folder, names or [], **given), folder, report, open_page)


@contextlib.contextmanager
def _shown(path: Path) -> Iterator[None]:
    """A browser can see the study while it runs, and after it, until Ctrl-C; where nobody is at the terminal, no longer."""
    from nanostudy.ui.serve import beside

    with beside(path) as address:
        print(f"ui       {address}", flush=True)
        yield
        if sys.stdin.isatty():
            print(f"\nui       {address}\n         Ctrl-C ends it")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)


def _write_page(path: Path) -> Path | None:
    """None where it cannot be written, which is no reason for a study to fail."""
    try:
        return nanostudy.report(path)
    except NanostudyError as problem:
        print(f"\nThe page could not be written: {problem}", file=sys.stderr)
        return None


def _run(run: Callable[[], list[Result]], path: Path, report: bool, open_page: bool) -> None:
    """Runs it and prints the results; exit code 1 where something failed, or all that was trained diverged."""
    from nanostudy.study.folder import RESULTS_FILE
    from nanostudy.study.listing import Listing, best_lines, failure_lines, lost_lines

    since = time.monotonic()
    with stopped_at_once():
        rows = run()
    finished = [row for row in rows if row.status == "finished" and row.val_loss is not None]
    listing = Listing.of(path)
    print(f"\n{len(finished)} of {len(rows)} experiments finished; this took {duration(time.monotonic() - since)}")
    for line in best_lines(rows, listing):
        print(line)
    if finished:
        folder, page = shlex.quote(str(path)), _write_page(path) if report else None
        print(f"\nresults  {path / RESULTS_FILE}")
        print(f"page     {page}" if page else f"page     nanostudy report {folder} writes it")
        print(f"sample   nanostudy sample {folder}")
        if page and open_page:
            webbrowser.open(page.resolve().as_uri())
    for line in [*failure_lines(rows, listing), *lost_lines({row.name: row.status for row in rows}, path)]:
        print(line)
    if any(row.status == "failed" for row in rows) or (not finished and any(row.status == "diverged" for row in rows)):
        raise typer.Exit(1)


@app.command("plan")
@options(PLAN_OPTIONS)
def plan_command(
    source: Source,
    axes: Axes = None,
    out: Out = None,
    part: Part = None,
    only: Only = None,
    plan_for: Annotated[
        str | None,
        typer.Option(help="Other machines: 8xH200, 64 cores, '16x8 cores 32GiB'. Simulates the run there."),
    ] = None,
    format: Format = Form.table,
    **given: Any,
) -> None:
    """What a study would do here: stacks, memory, arithmetic, estimated time. Runs only a short calibration."""
    from nanostudy.settings_files import parse_assignments
    from nanostudy.study.listing import as_json

    settings = parse_assignments(axes or [])
    plan = nanostudy.plan_study(source, out, settings=settings, parts=part or [], only=only, plan_for=plan_for, **given)
    if format is Form.table:
        print_plan(plan)
    elif format is Form.json and plan.prediction:
        print(as_json({**prediction_record(plan, plan.prediction), "stacks": stack_records(plan)}))
    else:
        _print_records(stack_records(plan), format)


def _print_records(table: Sequence[dict[str, Any]], format: Form) -> None:
    from nanostudy.study.listing import as_csv, as_json

    print(as_csv(table).removesuffix("\n") if format is Form.csv else as_json(table))


@app.command("seeds")
def seeds_command(
    study: Annotated[str, typer.Argument(help=FOLDER, autocompletion=studies_like)],
    difference: Difference = 0.01,
    json: Json = False,
) -> None:
    """How many seeds tell two settings apart, from the variances that a study shows, and how long those take."""
    from nanostudy.reporting.next_steps import seeds_lines, seeds_record
    from nanostudy.study.listing import as_json

    seeds = nanostudy.plan_seeds(study, difference)
    if json:
        print(as_json(seeds_record(seeds)))
        return
    for line in seeds_lines(seeds):
        show(line)


@app.command("confirm")
@options(RUN)
def confirm_command(
    study: Folder,
    most: Annotated[int, typer.Option(min=1, help="Of the settings tied for the best, the most to run.")] = 4,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Fresh seeds. Default: as many as tell the difference, from 5 to 32.")
    ] = None,
    difference: Difference = 0.01,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only the plan: experiments, stacks, estimated time.")
    ] = False,
    **given: Any,
) -> None:
    """Run the settings tied for a study's best again on fresh seeds, for a loss that no choice has biased."""
    from nanostudy.referee import confirmation
    from nanostudy.reporting.next_steps import confirmation_sentence

    plan, folder = confirmation(study, most, seeds, difference)
    print(f"{plan.description}: seeds {plan.seeds[0]} to {plan.seeds[-1]}\n" if plan.seeds else "")
    if dry_run:
        print_plan(nanostudy.plan_study(plan, folder, **{name: given[name] for name in PLAN_OPTIONS}))
        return
    with stopped_at_once():
        result = nanostudy.confirm_study(study, most=most, seeds=seeds, difference=difference, **given)
    print(f"\n{textwrap.fill(confirmation_sentence(result), report_width())}\n\nresults  {folder}")
    print(f"report   nanostudy report {shlex.quote(str(study))}")


@app.command("status")
def status_command(
    folder: Folder,
    format: Format = Form.table,
    all: Annotated[bool, typer.Option("--all", help="Every experiment, not only the best.")] = False,
) -> None:
    """How far a study is, also while it runs: done, running, failed, time left, best so far."""
    from nanostudy.study.listing import records, status_lines
    from nanostudy.study.notes import read_notes
    from nanostudy.study.store import FILE, Store

    with Store.read(folder / FILE) as store:
        if format is Form.table:
            print("\n".join(status_lines(store, folder, all)))
        else:
            notes = read_notes(folder)
            marks = {name: {"star": note.star, "note": note.text} for name, note in notes.items()}
            none = {"star": False, "note": ""} if notes else {}
            _print_records([{**row, **marks.get(row["name"], none)} for row in records(store.rows())], format)


@app.command("note")
def note_command(
    folder: Folder,
    experiment: Annotated[
        str | None, typer.Argument(help="Its number in the listings, or its name. Without it, all notes are listed.")
    ] = None,
    text: Annotated[str | None, typer.Argument(help="The note; '' deletes it.")] = None,
    star: Annotated[
        bool | None, typer.Option("--star/--no-star", help="Mark it with a star, or take that away.")
    ] = None,
) -> None:
    """Keep a note or a star beside an experiment: listings and pages show it, and merges keep it."""
    from nanostudy.study.listing import Listing
    from nanostudy.study.notes import annotate
    from nanostudy.study.store import FILE, Store

    with Store.read(folder / FILE) as store:
        if experiment is not None:
            rows = [store.row(experiment)]
            if text is not None or star is not None:
                annotate(folder, rows[0].name, text, star)
        listing = Listing.of(folder)
        rows = rows if experiment is not None else store.rows(names=list(listing.notes))
    command = f"nanostudy study note {shlex.quote(str(folder))} NUMBER TEXT --star"
    print("\n".join(listing.lines(rows)) if rows else f"No experiment of {folder} has a note. Add one: {command}")


@app.command("list")
def list_command(format: Format = Form.table) -> None:
    """List the studies that come with nanostudy."""
    from nanostudy.study.definition import read_study, study_names

    studies = [{"name": name, "description": read_study(name).description} for name in study_names()]
    if format is not Form.table:
        _print_records(studies, format)
        return
    print("\n".join(beside([(study["name"], study["description"]) for study in studies])))


@app.command("merge")
def merge_command(
    sources: Annotated[list[Path], typer.Argument(help="Folders of parts of one study.")],
    into: Annotated[Path, typer.Option(help="The folder that gets all results.")],
) -> None:
    """Put the results of several people's or machines' folders together."""
    for line in nanostudy.merge_study(sources, into):
        show(line)


@app.command("import")
def import_command(
    tables: Annotated[
        list[Path], typer.Argument(help="Tables of results: .csv, .tsv, .json, JSON lines, train.py's logs.")
    ],
    out: Annotated[Path | None, typer.Option(help="A new folder. Default: imports/ and the table's name.")] = None,
    loss: Loss = "",
    name: Name = "",
    factors: Factors = "",
) -> None:
    """Take over somebody's table of results: in nanostudy's columns, and as a study that trains its experiments here."""
    imported = nanostudy.import_study(*tables, out=out, **columns(loss, name, factors))
    for note in imported.notes:
        print_paragraph(printable(note))
    print(f"table    {imported.table}")
    print(f"study    {imported.study or 'none'}{f' ({imported.why})' if imported.why else ''}")
    print(f"report   nanostudy report {shlex.quote(str(imported.table))}")


@app.command("export")
def export_command(
    folder: Folder,
    to: Annotated[
        Path | None, typer.Option(help="Where to. Default: the study's folder, under the layout's name.")
    ] = None,
    layout: Annotated[
        Layout,
        typer.Option(help="published: the hand-run study's tables and folders. findings: a small folder to publish."),
    ] = Layout.published,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="With findings: a table or a study of others, whose effects stand beside these; may be given again."
        ),
    ] = None,
) -> None:
    """Write a study's results in the layout of the published study, or its findings as a small folder without weights."""
    to = to or folder / layout
    if layout is Layout.published:
        from nanostudy.study.export import export_published

        lines = export_published(folder, to)
    else:
        from nanostudy.reporting.publication import publish_findings

        lines = publish_findings(folder, to, beside or [])
    for line in lines:
        show(line)


@app.command("check")
def check_command(folder: Folder, json: Json = False) -> None:
    """Check a study's folder: store, run folders and weights against each other. Exit code 1 where something is damaged."""
    from nanostudy.study.check import check
    from nanostudy.study.listing import as_json

    checked = check(folder)
    if json:
        print(as_json(checked.as_record()))
    for line in () if json else checked.as_lines():
        show(line)
    if checked.findings:
        raise typer.Exit(1)


@app.command("rebuild")
def rebuild_command(folder: Folder) -> None:
    """Make a lost or damaged store again from the run folders and from what can be read of it."""
    from nanostudy.study.folder import rebuild

    experiments, results, notes = rebuild(folder)
    for note in notes:
        show(note)
    print(f"{experiments:,} experiments, {results:,} results")
