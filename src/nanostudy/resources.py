"""What a person asks of the machine."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

from nanostudy.errors import UsageError

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a person asks for. It changes how a result is computed, and is no part of an experiment's identity."""

    device: str = field(default="auto", metadata={"meaning": "auto, cpu, cuda, cuda:N or mps"})
    precision: str = field(
        default="auto", metadata={"meaning": "auto, fp32, bf16 or fp16: of products; weights stay fp32"}
    )
    compile: str = field(
        default="auto", metadata={"meaning": "auto, yes or no: kernels built once by this machine's compiler"}
    )
    threads: int | None = field(default=None, metadata={"meaning": "CPU threads; none: one a core"})

    def __post_init__(self) -> None:
        if not isinstance(self.precision, str) or self.precision not in ("auto", *PRECISIONS):
            raise UsageError(f"precision={self.precision!r} is not known: auto, {', '.join(PRECISIONS)}.")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda|cuda:\d+|mps", self.device):
            raise UsageError(f"device={self.device!r} is not known: auto, cpu, cuda, cuda:N or mps.")
        if isinstance(self.compile, bool):  # as YAML reads yes and no
            object.__setattr__(self, "compile", "yes" if self.compile else "no")
        if self.compile not in ("auto", "yes", "no"):
            raise UsageError(f"compile={self.compile!r} is not known: auto, yes or no.")
        threads = str(self.threads).lower()
        if threads in ("none", "null"):
            object.__setattr__(self, "threads", None)
        elif isinstance(self.threads, (int, str)) and re.fullmatch(r"0*[1-9]\d{0,3}", threads):
            object.__setattr__(self, "threads", int(threads))
        else:
            raise UsageError(f"threads={self.threads!r} must be a whole number from 1 to 9999, or none.")


RESOURCE_NAMES = tuple(field.name for field in dataclasses.fields(Resources))
