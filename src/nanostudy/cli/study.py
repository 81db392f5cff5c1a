"""The commands of `nanostudy study`: parse, call, print."""

from __future__ import annotations

import shlex
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanostudy.cli.options import (
    Axes,
    Factors,
    Folder,
    Form,
    Format,
    Loss,
    Name,
    Only,
    Out,
    Part,
    Source,
    columns,
    options,
)
from nanostudy.settings import PLAN_OPTIONS, RUN_OPTIONS
from nanostudy.text import printable

if TYPE_CHECKING:
    from nanostudy.result import Result
    from nanostudy.study.forecast import Plan
    from nanostudy.study.simulate import Prediction


MOST_STACKS = 40  # rows of a plan's table
REPORT_WIDTH = 100  # columns
LONGEST_IDS = 60  # characters of a stack's ids there
RUN = [name for name in RUN_OPTIONS if name != "save_every"]


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Many experiments as one job.")


@app.command("run")
@options(RUN)
def run_command(
    source: Source, axes: Axes = None, out: Out = None, part: Part = None, only: Only = None, **given: Any
) -> None:
    """Run a study; run the same command again to go on after an interruption."""
    from nanostudy.api import run_study
    from nanostudy.settings_files import parse_assignments
    from nanostudy.study.definition import folder_of

    path, settings = out or folder_of(source), parse_assignments(axes or [])
    _run(lambda: run_study(source, path, settings=settings, parts=part or [], only=only, **given), path)


@app.command("retry")
@options(RUN)
def retry_command(
    folder: Folder,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Experiments that failed, or whose run folders are lost or damaged. Default: all."),
    ] = None,
    **given: Any,
) -> None:
    """Run experiments again that failed, or whose run folders are lost or damaged."""
    from nanostudy.api import retry_study
    from nanostudy.study.definition import existing_folder

    path = existing_folder(folder)
    _run(lambda: retry_study(path, names or [], **given), path)


def _run(run: Callable[[], list[Result]], path: Path) -> None:
    """Runs it and prints the results; exit code 1 where something failed, or all that was trained diverged."""
    from nanostudy.errors import Interrupted
    from nanostudy.study.folder import RESULTS_FILE
    from nanostudy.study.listing import best_lines, failure_lines, lost_lines
    from nanostudy.text import duration

    since = time.monotonic()
    try:
        rows = run()
    except KeyboardInterrupt:
        raise Interrupted("stopped at once, without saving; the last checkpoints are whole.") from None
    finished = [row for row in rows if row.status == "finished" and row.val_loss is not None]
    print(f"\n{len(finished)} of {len(rows)} experiments finished; this took {duration(time.monotonic() - since)}")
    for line in best_lines(rows):
        print(line)
    if finished:
        best = path / min(finished, key=lambda row: (row.val_loss, row.id)).name
        print(f"\nresults  {path / RESULTS_FILE}")
        if (best / "sample.txt").exists():
            print(f"sample   {best / 'sample.txt'}")
        print(f"report   nanostudy report {shlex.quote(str(path))}")
        print(f"more     nanostudy sample {shlex.quote(str(best))}")
    for line in [*failure_lines(rows, path), *lost_lines({row.name: row.status for row in rows}, path)]:
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
    from nanostudy.api import plan_study
    from nanostudy.settings_files import parse_assignments
    from nanostudy.study.listing import as_json

    settings = parse_assignments(axes or [])
    plan = plan_study(source, out, settings=settings, parts=part or [], only=only, plan_for=plan_for, **given)
    if format is Form.table:
        _print_plan(plan)
    elif format is Form.json and plan.prediction:
        print(as_json({**_prediction_record(plan, plan.prediction), "stacks": _stack_records(plan)}))
    else:
        _print_records(_stack_records(plan), format)


def _print_records(table: Sequence[dict[str, Any]], format: Form) -> None:
    from nanostudy.study.listing import as_csv, as_json

    print(as_csv(table).removesuffix("\n") if format is Form.csv else as_json(table))


def _stack_records(plan: Plan) -> list[dict[str, Any]]:
    turns = plan.prediction.run.turns if plan.prediction else [None] * len(plan.stacks)
    return [
        {
            "stack": i,
            "members": len(stack.members),
            "width": stack.width,
            "memory_bytes": stack.memory,
            "flops": stack.flops,
            "tokens": stack.tokens,
            "seconds": None if stack.seconds is None else round(stack.seconds, 1),
            **({"worker": turn.worker, "begins": round(turn.begin, 1)} if turn else {}),
            "first": stack.members[0].name,
            "ids": " ".join(str(entry.id) for entry in stack.members),
        }
        for i, (stack, turn) in enumerate(zip(plan.stacks, turns, strict=True), start=1)
    ]


def _prediction_record(plan: Plan, prediction: Prediction) -> dict[str, Any]:
    """Seconds, and shares of the time for which workers are busy."""
    assert plan.elsewhere
    least, mean, most = prediction.shares()
    return {
        "plan_for": plan.elsewhere.text,
        "device": plan.elsewhere.gpu.name if plan.elsewhere.gpu else "cpu",
        "precision": plan.capacity.precision,
        "workers": plan.capacity.workers,
        "memory_bytes": plan.capacity.memory,
        "pace": plan.calibration,
        "seconds": round(prediction.seconds, 1),
        "seconds_of_recording": round(prediction.recording, 1),
        "seconds_divided_evenly": round(prediction.even, 1),
        "seconds_of_the_longest": round(prediction.longest, 1),
        "workers_that_help": prediction.useful,
        "busy_least": round(least, 4),
        "busy_mean": round(mean, 4),
        "busy_most": round(most, 4),
        "tail_seconds": round(prediction.tail, 1),
    }


def _print_plan(plan: Plan) -> None:
    from nanostudy.study.listing import as_lines
    from nanostudy.text import counted, duration, ranges

    rows = [
        {
            "": str(row["stack"]),
            "members": str(row["members"]),
            "width": str(row["width"]),
            "memory": f"{row['memory_bytes'] / 2**20:,.0f} MiB",
            "flop": f"{row['flops']:.1e}",
            "tokens": f"{row['tokens']:,}",
            "time": "" if stack.seconds is None else f"~{duration(stack.seconds)}",
            "ids": _shortened(ranges([entry.id for entry in stack.members])),
            "the first": row["first"],
        }
        for row, stack in zip(_stack_records(plan)[:MOST_STACKS], plan.stacks, strict=False)
    ]
    for line in as_lines(rows):
        print(line)
    if len(plan.stacks) > MOST_STACKS:
        print(f"and {len(plan.stacks) - MOST_STACKS:,} more stacks; --format csv or json has every one")
    for text in plan.skipped:
        print(f"skipped as impossible: {text}")
    capacity, waiting = plan.capacity, sum(len(stack.members) for stack in plan.stacks)
    done = f"; {plan.done:,} done already" if plan.done else ""
    failed = f"; {plan.failed:,} failed, which `nanostudy study retry` runs again" if plan.failed else ""
    order = f" in {counted(len(plan.stacks), 'stack')}, the longest first" if waiting else " to run"
    print(f"{chr(10) if rows else ''}{counted(waiting, 'experiment')}{order}{done}{failed}")
    limit = "not known" if capacity.memory is None else f"{capacity.memory / 2**20:,.0f} MiB per worker"
    gpu = plan.elsewhere.gpu if plan.elsewhere else None
    threads = "" if gpu else f"{counted(plan.threads, 'thread')} each, "
    device = gpu.name if gpu else capacity.device
    print(f"workers  {capacity.workers:,} on {device}, {threads}{capacity.precision}; memory {limit}")
    for note in plan.notes:
        print(f"         {note}")
    tight = [s for s in plan.stacks if capacity.memory is not None and s.memory > capacity.memory]
    for stack in tight[:MOST_STACKS]:
        advice = "" if plan.elsewhere else ": fewer --workers leave it more"
        print(f"         {stack.members[0].name} may need more memory than that{advice}")
    if waiting:
        flops, tokens = sum(stack.flops for stack in plan.stacks), sum(stack.tokens for stack in plan.stacks)
        print(f"work     {flops:.2e} floating-point operations, {tokens:,} tokens of training")
        time_needed = "not known" if plan.seconds is None else f"about {duration(plan.seconds)}"
        print(f"time     {time_needed}" + ("" if plan.prediction else f" (calibration: {plan.calibration})"))
        if plan.prediction:
            _print_prediction(plan, plan.prediction)


def _print_prediction(plan: Plan, prediction: Prediction) -> None:
    from nanostudy.text import counted, duration

    least, mean, most = prediction.shares()
    print(f"busy     {mean:.1%} of the time in the mean of the workers ({least:.1%} to {most:.1%})")
    waits = duration((1 - least) * prediction.seconds)
    print(f"         the least busy starts and waits for {waits}, {duration(prediction.tail)} of it at the end")
    print(f"evenly   {duration(prediction.even)}, if the same work were divided evenly among the workers")
    most_useful = f"about {counted(prediction.useful, 'worker')}; more would not help"
    print(f"at best  {duration(prediction.longest)}, the longest experiment's own time, with {most_useful}")
    print(f"records  {duration(prediction.recording)} of the study's own process, which no worker shortens")
    print(f"pace     {plan.calibration}")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_IDS else f"{text[:LONGEST_IDS].rsplit(' ', 1)[0]} ..."


@app.command("seeds")
def seeds_command(
    study: Folder,
    difference: Annotated[float, typer.Option(help="Of validation losses, in nats per token.")] = 0.01,
    json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """How many seeds tell two settings apart, from the variances that a study shows, and how long those take."""
    from nanostudy.referee import plan_seeds
    from nanostudy.reporting.next_steps import seeds_lines, seeds_record
    from nanostudy.study.listing import as_json

    seeds = plan_seeds(study, difference)
    print(as_json(seeds_record(seeds)) if json else "\n".join(seeds_lines(seeds)))


@app.command("confirm")
@options(RUN)
def confirm_command(
    study: Folder,
    most: Annotated[int, typer.Option(min=1, help="Of the settings tied for the best, the most to run.")] = 4,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Fresh seeds. Default: as many as tell the difference, from 5 to 32.")
    ] = None,
    difference: Annotated[float, typer.Option(help="Of validation losses, in nats per token.")] = 0.01,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only the plan: experiments, stacks, estimated time.")
    ] = False,
    **given: Any,
) -> None:
    """Run the settings tied for a study's best again on fresh seeds, for a loss that no choice has biased."""
    from nanostudy.api import plan_study
    from nanostudy.referee import confirm_study, confirmation
    from nanostudy.reporting.next_steps import confirmation_sentence
    from nanostudy.study.definition import existing_folder

    plan, folder = confirmation(study, most, seeds, difference)
    print(f"{plan.description}: seeds {plan.seeds[0]} to {plan.seeds[-1]}\n" if plan.seeds else "")
    if dry_run:
        _print_plan(plan_study(plan, folder, **{name: given[name] for name in PLAN_OPTIONS}))
        return
    result = confirm_study(study, most=most, seeds=seeds, difference=difference, **given)
    print(f"\n{textwrap.fill(confirmation_sentence(result), REPORT_WIDTH)}\n\nresults  {folder}")
    print(f"report   nanostudy report {shlex.quote(str(existing_folder(study)))}")


@app.command("status")
def status_command(
    folder: Folder,
    format: Format = Form.table,
    all: Annotated[bool, typer.Option("--all", help="Every experiment, not only the best.")] = False,
) -> None:
    """How far a study is, also while it runs: done, running, failed, time left, best so far."""
    from nanostudy.study.definition import existing_folder
    from nanostudy.study.listing import records, status_lines
    from nanostudy.study.store import FILE, Store

    path = existing_folder(folder)
    with Store.read(path / FILE) as store:
        if format is Form.table:
            print("\n".join(status_lines(store, path, all)))
        else:
            _print_records(list(records(store.rows())), format)


@app.command("list")
def list_command(format: Format = Form.table) -> None:
    """List the studies that come with nanostudy."""
    from nanostudy.study.definition import read_study, study_names

    studies = [{"name": name, "description": read_study(name).description} for name in study_names()]
    if format is not Form.table:
        _print_records(studies, format)
        return
    for study in studies:
        print(f"{study['name']:31}{study['description']}")


@app.command("merge")
def merge_command(
    sources: Annotated[list[Path], typer.Argument(help="Folders of parts of one study.")],
    into: Annotated[Path, typer.Option(help="The folder that gets all results.")],
) -> None:
    """Put the results of several people's or machines' folders together."""
    from nanostudy.study.merge import merge

    for line in merge(sources, into):
        print(printable(line))


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
    from nanostudy.api import import_study

    imported = import_study(*tables, out=out, **columns(loss, name, factors))
    for note in imported.notes:
        print(f"{textwrap.fill(printable(note), REPORT_WIDTH)}\n")
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
        str,
        typer.Option(help="published: the hand-run study's tables and folders. findings: a small folder to publish."),
    ] = "published",
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="With findings: a table or a study of others, whose effects stand beside these; may be given again."
        ),
    ] = None,
) -> None:
    """Write a study's results in the layout of the published study, or its findings as a small folder without weights."""
    from nanostudy.errors import UsageError
    from nanostudy.study.definition import existing_folder

    if layout not in ("published", "findings"):
        raise UsageError(f"--layout {layout!r} is not known: published or findings.")
    path = existing_folder(folder)
    to = to or path / layout
    if layout == "published":
        from nanostudy.study.export import export_published

        lines = export_published(path, to)
    else:
        from nanostudy.reporting.publication import publish_findings

        lines = publish_findings(path, to, beside or [])
    for line in lines:
        print(printable(line))


@app.command("check")
def check_command(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="For a program.", show_default=False)] = False
) -> None:
    """Check a study's folder: store, run folders and weights against each other. Exit code 1 where something is damaged."""
    from nanostudy.study.check import check
    from nanostudy.study.definition import existing_folder
    from nanostudy.study.listing import as_json as to_json

    checked = check(existing_folder(folder))
    for line in [to_json(checked.as_record())] if as_json else checked.as_lines():
        print(printable(line))
    if checked.findings:
        raise typer.Exit(1)


@app.command("rebuild")
def rebuild_command(folder: Folder) -> None:
    """Make a lost or damaged store again from the run folders and from what can be read of it."""
    from nanostudy.study.definition import existing_folder
    from nanostudy.study.folder import rebuild

    experiments, results, notes = rebuild(existing_folder(folder))
    for note in notes:
        print(printable(note))
    print(f"{experiments:,} experiments, {results:,} results")
