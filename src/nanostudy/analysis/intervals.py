"""What intervals share: 95%, Student's t, and the degrees of freedom of a sum of variances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

Numbers = Sequence[float] | np.ndarray

CONFIDENCE = 0.95


def student(df: Any, confidence: Any = CONFIDENCE) -> Any:
    """How many standard errors half an interval is wide; numbers or arrays."""
    return stats.t.ppf((1 + confidence) / 2, df)


def satterthwaite(variances: Numbers, dfs: Numbers) -> float:
    """The degrees of freedom of the sum of variances with so many each (Satterthwaite, 1946; Welch, 1947)."""
    total = float(sum(variances))
    return total**2 / sum(one**2 / df for one, df in zip(variances, dfs, strict=True)) if total else math.inf
