"""A plan as the terminal shows it, and as records for a program."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from nanostudy.text import beside, counted, duration, ranges

if TYPE_CHECKING:
    from nanostudy.study.forecast import Plan
    from nanostudy.study.simulate import Prediction

MOST_STACKS = 40  # rows of the table
LONGEST_IDS = 24  # characters of a stack's ids there


def stack_records(plan: Plan) -> list[dict[str, Any]]:
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


def prediction_record(plan: Plan, prediction: Prediction) -> dict[str, Any]:
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


def print_plan(plan: Plan) -> None:
    from nanostudy.study.listing import as_lines

    rows = [
        {
            "": str(row["stack"]),
            "members": str(row["members"]),
            "at once": str(row["width"]),
            "memory": f"{row['memory_bytes'] / 2**20:,.0f} MiB",
            "time": "" if stack.seconds is None else f"~{duration(stack.seconds)}",
            "ids": _shortened(ranges([entry.id for entry in stack.members])),
            "the first": plan.label(stack),
        }
        for row, stack in zip(stack_records(plan)[:MOST_STACKS], plan.stacks, strict=False)
    ]
    print("\n".join(as_lines(rows, shutil.get_terminal_size().columns, "the first")))
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
        print(f"         {plan.label(stack)} may need more memory than that{advice}")
    if waiting:
        flops, tokens = sum(stack.flops for stack in plan.stacks), sum(stack.tokens for stack in plan.stacks)
        print(f"work     {flops:.2e} floating-point operations, {tokens:,} tokens of training")
        time_needed = "not known" if plan.seconds is None else f"about {duration(plan.seconds)}"
        how = "" if plan.prediction else f" (calibration: {plan.calibration})"
        print("\n".join(beside([("time", f"  {time_needed}{how}")])))
        if plan.prediction:
            _print_prediction(plan, plan.prediction)


def _print_prediction(plan: Plan, prediction: Prediction) -> None:
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
