"""Several processes that train as one, as torchrun starts them: who each is, and what they tell one another.

A process on its own is the first of one: the same code, and nothing is told to anybody.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanostudy.errors import Interrupted, NanostudyError, RankLost, ReportedElsewhere, UsageError

PATIENCE = timedelta(minutes=10)  # that ranks have with one that is silent; one that ends is noticed at once
PRECEDENCE = 0.5  # seconds that the first rank gets to say what all of them found wrong

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its training. The first one reads, writes and speaks for all."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine
    local_count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """The places of `count` that are this rank's: neighbours, as many as any other rank's or one fewer. Raises UsageError
        where there are too few for all ranks."""
        if count < self.count:
            raise UsageError(
                f"An update has {count} sequences (batch_size times gradient_accumulation_steps), too few for {self.count} ranks. "
                "Start fewer, or raise batch_size."
            )
        return range(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def add(self, numbers: Tensor) -> None:
        """Adds up over ranks, in place: to the same bits at all of them. Raises RankLost."""
        if self.count > 1:
            with _heard():
                dist.all_reduce(numbers)

    def meet(self) -> None:
        """Waits until all are here. Raises RankLost."""
        self.add(torch.zeros(1))

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, at all of them; the others do not call it. Raises RankLost."""
        if self.count == 1:
            return make()
        made = [make() if self.first else None]
        with _heard():
            dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raises UsageError, at all ranks, where one of them has other facts than the first. Raises RankLost."""
        if self.count == 1:
            return
        found: list[Mapping[str, object]] = [{}] * self.count
        with _heard():
            dist.all_gather_object(found, dict(facts))
        for rank, theirs in enumerate(found):
            other = [
                f"{key} {theirs.get(key, 'unknown')} there, {value} at rank 0"
                for key, value in found[0].items()
                if theirs.get(key, "unknown") != value
            ]
            if other:
                raise UsageError(f"rank {rank} would not train the same as the others: {', '.join(other)}.")


ALONE = Ranks()
_trainings = itertools.count()


def started() -> Ranks:
    """As the environment says, which torchrun sets."""
    rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdigit() and count.isdigit() and int(count) > 1):
        return ALONE
    return Ranks(
        int(rank), int(count), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """In touch with the other ranks until the end of the block, or of an outer one.

    Whatever goes wrong is said by one of them, the first or whom it happened to: at the others the block raises
    ReportedElsewhere. Raises NanostudyError where the ranks do not find one another.
    """
    ranks = started()
    if ranks.count == 1 or (dist.is_available() and dist.is_initialized()):
        yield ranks
        return
    failures = _join(ranks)
    try:
        yield ranks
    except (Exception, KeyboardInterrupt) as problem:
        # the group is left as it is: one whose members are gone cannot be left in good order, and this process ends
        if not _speaks(ranks, failures, problem):
            raise ReportedElsewhere("Another rank of this training says what went wrong.") from None
        if isinstance(problem, NanostudyError) and not ranks.first:
            raise type(problem)(f"rank {ranks.rank}: {problem}") from problem
        raise
    dist.destroy_process_group()


def _join(ranks: Ranks) -> Callable[[], int]:
    """Gives what counts failures: the first to call it anywhere gets 1."""
    if not dist.is_available():
        raise UsageError(f"torchrun started {ranks.count} ranks, and this PyTorch was built without torch.distributed.")
    from torch.distributed.rendezvous import rendezvous

    # NCCL moves what lies on GPUs, gloo all else
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
        # what an earlier training of this process left in it is not read
        store = dist.PrefixStore(f"training{next(_trainings)}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as problem:
        raise NanostudyError(
            f"The {ranks.count} ranks did not find one another ({_line(problem)}). Start them with torchrun --nproc-per-node N "
            "-m nanostudy train ...; on several machines each needs the same --rdzv-endpoint, and a way through to it."
        ) from problem
    return lambda: store.add("failures", 1)


def _speaks(ranks: Ranks, failures: Callable[[], int], problem: BaseException) -> bool:
    """Whether this rank is the one to say it: the first to fail, and of those that fail together the first rank."""
    if isinstance(problem, Interrupted | KeyboardInterrupt):  # reaches all of them, or the first says who was lost
        return ranks.first
    if not ranks.first and not isinstance(problem, RankLost):
        time.sleep(PRECEDENCE)
    try:
        earliest = failures() == 1
    except RuntimeError:  # the count went with the rank that kept it
        earliest = True
    return earliest


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # of this rank
        raise
    except RuntimeError as problem:
        raise RankLost(
            f"Another rank has ended, or cannot be reached ({_line(problem)}), and this training with it. "
            "Its checkpoint is whole: the same command goes on."
        ) from problem


def _line(problem: Exception) -> str:
    """Its first sentence, without the place in a library's source that gloo begins with."""
    return re.sub(r"^\[[^]]*\] ", "", str(problem).strip()).split("\n")[0].split(". ")[0].rstrip(".")
