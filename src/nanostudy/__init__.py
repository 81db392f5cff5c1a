"""A laboratory for small GPTs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanostudy.version import VERSION as __version__

__all__ = [
    "Experiment",
    "Run",
    "__version__",
    "analyze",
    "convert",
    "count_parameters",
    "load",
    "load_corpus",
    "merge_study",
    "plan_study",
    "preset",
    "report",
    "retry_study",
    "run_study",
    "train",
    "workspace",
]

if TYPE_CHECKING:
    from nanostudy.analyses import analyze, report
    from nanostudy.api import Run, convert, count_parameters, load, load_corpus, preset, train
    from nanostudy.notebook import workspace
    from nanostudy.settings import Experiment
    from nanostudy.studies import merge_study, plan_study, retry_study, run_study


def __getattr__(name: str) -> Any:
    # Looked up when used, so that `nanostudy --help` does not wait for torch.
    if name == "Experiment":
        from nanostudy.settings import Experiment

        return Experiment
    if name in ("analyze", "report"):
        from nanostudy import analyses

        return getattr(analyses, name)
    if name == "workspace":
        from nanostudy.notebook import workspace

        return workspace
    if name in __all__ and name.endswith("_study"):
        from nanostudy import studies

        return getattr(studies, name)
    if name in __all__:
        from nanostudy import api

        return getattr(api, name)
    raise AttributeError(f"module 'nanostudy' has no attribute {name!r}")
