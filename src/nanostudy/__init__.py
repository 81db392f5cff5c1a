"""A laboratory for small GPTs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nanostudy.version import VERSION as __version__

if TYPE_CHECKING:
    from nanostudy.api import (
        Run,
        analyze,
        convert,
        count_parameters,
        import_study,
        load,
        load_corpus,
        merge_study,
        plan_study,
        preset,
        report,
        retry_study,
        run_study,
        train,
        workspace,
    )
    from nanostudy.errors import Interrupted, NanostudyError, UsageError
    from nanostudy.referee import confirm_study, judge, plan_seeds
    from nanostudy.settings import Experiment, Resources

__all__ = [
    "Experiment",
    "Interrupted",
    "NanostudyError",
    "Resources",
    "Run",
    "UsageError",
    "__version__",
    "analyze",
    "confirm_study",
    "convert",
    "count_parameters",
    "import_study",
    "judge",
    "load",
    "load_corpus",
    "merge_study",
    "plan_seeds",
    "plan_study",
    "preset",
    "report",
    "retry_study",
    "run_study",
    "train",
    "workspace",
]

MODULES = {
    **dict.fromkeys(("Experiment", "Resources"), "settings"),
    **dict.fromkeys(("Interrupted", "NanostudyError", "UsageError"), "errors"),
    **dict.fromkeys(("confirm_study", "judge", "plan_seeds"), "referee"),
}


def __getattr__(name: str) -> Any:
    """Looked up when used, so that `nanostudy --help` does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'nanostudy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nanostudy.{MODULES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return __all__
