"""Distributed training: the ranks that torchrun starts, and what they exchange.

A process on its own is rank 0 of one: the same code, without communication.
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

TIMEOUT = timedelta(minutes=10)  # for a rank that is silent; one that ends is noticed at once
HEAD_START = 0.5  # seconds for rank 0 to report an error that occurs at all ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its training. Rank 0 reads, writes and reports for all."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among the ranks of this machine
    local_count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's consecutive places among `count`. The shares of two ranks differ by one at most. Raises UsageError where
        there are fewer places than ranks."""
        if count < self.count:
            raise UsageError(
                f"An update has {count} sequences (batch_size times gradient_accumulation_steps), too few for {self.count} ranks. "
                "Start fewer, or raise batch_size."
            )
        return range(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def add(self, numbers: Tensor) -> None:
        """Sums over ranks, in place, to the same bits at each. Raises RankLost."""
        if self.count > 1:
            with _loss_detected():
                dist.all_reduce(numbers)

    def meet(self) -> None:
        """Waits until all ranks call this. Raises RankLost."""
        self.add(torch.zeros(1))

    def of_first(self, make: Callable[[], T]) -> T:
        """The result of rank 0's call, at all ranks; the others do not call `make`. Raises RankLost."""
        if self.count == 1:
            return make()
        made = [make() if self.first else None]
        with _loss_detected():
            dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raises UsageError, at all ranks, where one has other facts than rank 0. Raises RankLost."""
        if self.count == 1:
            return
        everyone: list[Mapping[str, object]] = [{}] * self.count
        with _loss_detected():
            dist.all_gather_object(everyone, dict(facts))
        for rank, theirs in enumerate(everyone):
            differences = [
                f"{key} {theirs.get(key, 'unknown')} there, {value} at rank 0"
                for key, value in everyone[0].items()
                if theirs.get(key, "unknown") != value
            ]
            if differences:
                raise UsageError(f"rank {rank} would not train the same as the others: {', '.join(differences)}.")


ALONE = Ranks()
_trainings = itertools.count()


def started() -> Ranks:
    """This process's rank, from the environment that torchrun sets."""
    rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdigit() and count.isdigit() and int(count) > 1):
        return ALONE
    return Ranks(
        int(rank), int(count), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Connects the ranks until the end of the block, or of an outer one.

    One rank reports an error: rank 0, or the one where it occurred. At the others the block raises ReportedElsewhere. Raises
    NanostudyError where the ranks do not find one another.
    """
    ranks = started()
    if ranks.count == 1 or (dist.is_available() and dist.is_initialized()):
        yield ranks
        return
    failures = _join(ranks)
    try:
        yield ranks
    except (Exception, KeyboardInterrupt) as problem:
        # the process group stays open: closing one with lost members may hang, and this process ends anyway
        if not _reports(ranks, failures, problem):
            raise ReportedElsewhere("Another rank of this training reports what went wrong.") from None
        if isinstance(problem, NanostudyError) and not ranks.first:
            raise type(problem)(f"rank {ranks.rank}: {problem}") from problem
        raise
    dist.destroy_process_group()


def _join(ranks: Ranks) -> Callable[[], int]:
    """Returns a counter of failures: its first call at any rank returns 1."""
    if not dist.is_available():
        raise UsageError(f"torchrun started {ranks.count} ranks, and this PyTorch was built without torch.distributed.")
    from torch.distributed.rendezvous import rendezvous

    # NCCL for tensors on GPUs, gloo for all others
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        # separate keys for each training of this process
        store = dist.PrefixStore(f"training{next(_trainings)}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.count, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as problem:
        raise NanostudyError(
            f"The {ranks.count} ranks did not find one another ({_line(problem)}). Start them with torchrun --nproc-per-node N "
            "-m nanostudy train ...; on several machines each needs the same --rdzv-endpoint, and a way through to it."
        ) from problem
    return lambda: store.add("failures", 1)


def _reports(ranks: Ranks, failures: Callable[[], int], problem: BaseException) -> bool:
    """Whether this rank reports the error: the first that fails; if all fail together, rank 0."""
    if isinstance(problem, Interrupted | KeyboardInterrupt):  # reaches all ranks, or rank 0 reports who was lost
        return ranks.first
    if not ranks.first and not isinstance(problem, RankLost):
        time.sleep(HEAD_START)
    try:
        earliest = failures() == 1
    except RuntimeError:  # the counter is lost with the rank that held it
        earliest = True
    return earliest


@contextlib.contextmanager
def _loss_detected() -> Iterator[None]:
    """Turns errors of the communication into RankLost."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # an error of this rank
        raise
    except RuntimeError as problem:
        raise RankLost(
            f"Another rank has ended, or cannot be reached ({_line(problem)}), and this training with it. "
            "Its checkpoint is whole: the same command goes on."
        ) from problem


def _line(problem: Exception) -> str:
    """Its first sentence, without the source location that gloo begins with."""
    return re.sub(r"^\[[^]]*\] ", "", str(problem).strip()).split("\n")[0].split(". ")[0].rstrip(".")
