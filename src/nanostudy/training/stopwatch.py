"""How fast a training is, for people: nothing that is trained depends on it."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds a step and an evaluation, measured in this sitting, whenever the host has caught up with the device."""

    def __init__(self) -> None:
        self.evaluation_seconds = 0.0
        self.step_seconds: float | None = None
        self.ticked = self.since = time.monotonic()
        self.steps = 0

    def stepped(self) -> None:
        self.steps += 1

    def evaluated(self, seconds: float) -> None:
        self.evaluation_seconds = seconds
        self.since, self.steps = time.monotonic(), 0

    def measured(self) -> float:
        """Steps a second since the last call or evaluation."""
        if self.steps:
            self.step_seconds = (time.monotonic() - self.since) / self.steps
            self.since, self.steps = time.monotonic(), 0
        return 1 / self.step_seconds if self.step_seconds else 0.0

    def tick(self) -> bool:
        now = time.monotonic()
        if now - self.ticked < 0.5:
            return False
        self.ticked = now
        return True

    def estimate(self, steps: float, evaluations: float) -> float | None:
        each = self.step_seconds
        if each is None and self.steps >= 3:
            each = (time.monotonic() - self.since) / self.steps
        return None if each is None else steps * each + evaluations * self.evaluation_seconds
