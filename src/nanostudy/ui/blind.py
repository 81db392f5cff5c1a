"""Which of two texts is better, by people who do not know which model wrote which; the tally of their answers.

Two models write after the same prompt with the same random numbers. A browser learns which they are with the answer's receipt.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanostudy.errors import UsageError

ANSWERS = ("left", "right", "neither")
MOST_OPEN = 256  # comparisons without an answer


@dataclass(frozen=True)
class Comparison:
    left: int  # experiments
    right: int


class Tally:
    """Of one study, as long as the server runs."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Comparison] = OrderedDict()
        self._answered: list[tuple[Comparison, str]] = []
        self._lock = threading.Lock()

    def draw(self, experiments: Sequence[int]) -> tuple[str, Comparison]:
        """Two of these at random, those compared least often first, on random sides; and the key of the comparison."""
        if len(experiments) < 2:
            raise UsageError("A comparison takes two models at least.")
        with self._lock:
            seen = {number: sum(number in (c.left, c.right) for c, _ in self._answered) for number in experiments}
            left, right = sorted(experiments, key=lambda number: (seen[number], secrets.randbits(32)))[:2]
            pair = Comparison(left, right) if secrets.randbits(1) else Comparison(right, left)
            key = secrets.token_urlsafe(12)
            self._open[key] = pair
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
            return key, pair

    def answer(self, key: str, better: str) -> Comparison:
        """Counts once. Raises UsageError."""
        if better not in ANSWERS:
            raise UsageError(f"better is one of {', '.join(ANSWERS)}.")
        with self._lock:
            pair = self._open.pop(key, None)
            if pair is None:
                raise UsageError("This comparison was answered already, or is too old.")
            self._answered.append((pair, better))
            return pair

    def summary(self, losses: Mapping[int, float | None]) -> dict[str, Any]:
        """How often each was better, and how often the model with the lower validation loss was, with Wilson's 95% interval."""
        from nanostudy.analysis.sample_quality import share_interval

        with self._lock:
            answered = list(self._answered)
        models: dict[int, dict[str, int]] = {}
        agreed = decided = 0
        for pair, better in answered:
            for number, side in ((pair.left, "left"), (pair.right, "right")):
                counts = models.setdefault(number, {"better": 0, "worse": 0, "neither": 0})
                counts["neither" if better == "neither" else "better" if better == side else "worse"] += 1
            left, right = losses.get(pair.left), losses.get(pair.right)
            if better != "neither" and left is not None and right is not None and left != right:
                decided += 1
                agreed += better == ("left" if left < right else "right")
        interval = [round(float(end), 3) for end in share_interval([agreed], [decided])] if decided else None
        return {
            "answers": len(answered),
            "models": [{"experiment": number, **counts} for number, counts in sorted(models.items())],
            "lower_loss": {"better": agreed, "of": decided, "interval": interval},
        }
