"""What would help a run under a budget of forgetting: more steps, a larger budget, a larger model, or nothing."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np

__all__ = ["LITTLE", "Course", "Gain", "Verdict", "verdict"]

_MEANS = 64
"""How many means a course holds at most, and half as many at least once there were so many values."""
_FEWEST = 16
"""Means that say whether a figure still falls."""
LITTLE = 0.02
"""Which share of what a run has gained so far is too little to ask for."""


class Gain(NamedTuple):
    """By how much a figure would fall in twice the steps, and twice the standard error."""

    fall: float
    error: float


class Verdict(NamedTuple):
    """What would lower the new task's loss: in a word, room being that of a larger budget or model, and a sentence."""

    helps: Literal["steps", "room", "nothing", "unknown"]
    sentence: str


class Course:
    """How a figure has gone over a run whose length is not known.

    It holds means over equally many values; when there are 64, neighbours are joined.

    Attributes:
        first: The first value; None before.

    Example:
        >>> course = Course()
        >>> for step in range(1000):
        ...     course.add(9.0 - math.log(step + 1))
        >>> round(course.gain().fall, 2)
        0.69
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self._means: list[float] = []
        self._span = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Take the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        if self.first is None:
            self.first = value
        self._open.append(value)
        if len(self._open) < self._span:
            return
        self._means.append(fmean(self._open))
        self._open = []
        if len(self._means) == _MEANS:
            self._means = [fmean(pair) for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._span *= 2

    def gain(self) -> Gain | None:
        """By how much it would fall in twice the steps, if it went on as before; of a loss, not below zero.

        Before is the last three quarters of the run, or its last half if it fell clearly less there: a figure that
        levels off falls less and less even with the logarithm of the steps.

        Returns:
            None if there are too few values.
        """
        if len(self._means) < _FEWEST:
            return None
        gain, late = self._trend(len(self._means) // 4), self._trend(len(self._means) // 2)
        gain = late if late.fall + late.error < gain.fall else gain
        return gain._replace(fall=min(gain.fall, max(0.0, self.level)))

    def _trend(self, first: int) -> Gain:
        """By a straight line over the logarithm of the steps, by least squares, from a mean on.

        The error takes into account that what is left over is correlated: the drift swings around its budget, and the
        loss with it.
        """
        means = np.array(self._means[first:])
        x = np.log(np.arange(first, len(self._means)) + 0.5)
        x -= x.mean()
        slope = (x @ means) / (x @ x)
        left = means - means.mean() - slope * x
        variance = (left @ left) / (len(left) - 2)
        correlation = min(max(0.0, (left[1:] @ left[:-1]) / max(left @ left, 1e-30)), 0.9)
        error = math.sqrt(variance / (x @ x) * (1 + correlation) / (1 - correlation))
        return Gain(float(-slope) * math.log(2), 2 * error * math.log(2))

    @property
    def level(self) -> float:
        """What it is at the end; infinite if that is not known."""
        return fmean(self._means[-4:]) if self._means else math.inf

    @property
    def total_gain(self) -> float:
        """By how much it is lower over the last quarter than at first; not negative."""
        if self.first is None or not self._means:
            return 0.0
        return max(0.0, self.first - fmean(self._means[-max(1, len(self._means) // 4) :]))

    def state_dict(self) -> dict[str, Any]:
        """All that it holds."""
        return {"first": self.first, "means": list(self._means), "span": self._span, "open": list(self._open)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self.first, self._span = state["first"], state["span"]
        self._means, self._open = list(state["means"]), list(state["open"])


def verdict(losses: Course, binds: bool, budget_gain: float | None) -> Verdict:
    """Say what would lower the new task's loss.

    More steps are judged by what twice the steps would gain if the loss went on falling with their logarithm. A gain
    counts if it is more than a fiftieth of what the run has gained, and by more than twice its standard error.
    Where the drift is at its budget and more steps gain nothing, the model has no room for the new task beside what it
    knew: more room is a larger budget, or a larger model.

    Args:
        losses: The new task's loss, a value for each optimizer step.
        binds: Whether the drift is at its budget.
        budget_gain: What a somewhat larger budget would gain, in nats; None if it isn't known.
    """
    gain = losses.gain()
    if gain is None:
        return Verdict("unknown", "The run is too short to say what would help.")
    least = LITTLE * losses.total_gain
    if gain.fall - gain.error > least:
        return Verdict(
            "steps", f"The new task's loss still falls: in twice the steps it would fall by about {gain.fall:.2g}."
        )
    if gain.fall + gain.error >= least:
        return Verdict(
            "unknown",
            "It can't be told whether more steps would help: the new task's loss varies by more than it falls.",
        )
    stalled = "More steps would not lower the new task's loss"
    if not binds:
        return Verdict("nothing", f"{stalled}, and a larger budget would not either.")
    if budget_gain is not None and budget_gain <= least:
        return Verdict("nothing", f"{stalled}, and a larger budget hardly would: nothing is needed.")
    return Verdict(
        "room", f"{stalled}: the model has no room for it at this budget. Use a larger budget, or a larger model."
    )
