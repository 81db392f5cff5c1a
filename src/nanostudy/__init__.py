"""A laboratory for small GPTs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanostudy.gpt.version import VERSION as __version__

__all__ = ["Experiment", "Run", "__version__", "load", "train"]

if TYPE_CHECKING:
    from nanostudy.api import Run, load, train
    from nanostudy.gpt.experiment import Experiment


def __getattr__(name: str) -> Any:
    # Looked up when used, so that `nanostudy --help` does not wait for torch.
    if name == "Experiment":
        from nanostudy.gpt.experiment import Experiment

        return Experiment
    if name in __all__:
        from nanostudy import api

        return getattr(api, name)
    raise AttributeError(f"module 'nanostudy' has no attribute {name!r}")
