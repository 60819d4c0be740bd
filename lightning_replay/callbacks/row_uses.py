"""How often each sampled row is used."""

from collections.abc import Mapping
from typing import Any, Literal

from lightning_replay.callbacks.reuse_gap import ReuseGap
from lightning_replay.utilities.distributed import Processes

__all__ = ["RowUses"]

_FIRST, _MOST, _DISTINCT_ROWS = 2, 4, 170
"""Of ``"auto"``: how often rows are used at first, and at most; how many different rows a run has at least before it
uses any again. In runs of 200 steps, 178 rows used twice kept 97% of what is forgotten without replay, 89 kept 94%
(`examples/paper/frontier.py`)."""
_GAP_SHARE = 0.25
"""By which share the loss on used rows may be below that on fresh ones: two uses had a sixth and kept what one kept,
four had a third and kept less."""


class RowUses:
    """A number of uses that is given, or one that follows the ``ReuseGap``.

    Args:
        given: How often each row is used. ``"auto"``: at first twice, but once in a run that would then have fewer than
            170 different rows; later as the gap allows.

    Attributes:
        now: How often rows are used now; 0 before ``begin``, if that decides.
    """

    def __init__(self, given: int | Literal["auto"]) -> None:
        self.given = given
        self.forget()

    @property
    def is_auto(self) -> bool:
        """Whether the number follows the gap."""
        return self.given == "auto"

    def forget(self) -> None:
        """Begin anew."""
        self.now = 0 if self.given == "auto" else self.given
        self._heeded = 0

    def begin(self, rows_of_run: int | None) -> None:
        """Decide the first number.

        Args:
            rows_of_run: How many rows the run draws; None if its length is not known.
        """
        if not self.now:
            self.now = 1 if rows_of_run is not None and rows_of_run < _FIRST * _DISTINCT_ROWS else _FIRST

    def heed(self, gap: ReuseGap, processes: Processes) -> None:
        """At the end of a pass, let the gap of one more refill change the number by one.

        Less if used rows are clearly learned by heart: if the gap is above twice its standard error, so that it is not
        noise, and above a quarter of the loss on fresh rows, so that it matters. Else more, up to four. A refill that
        has been used often enough by then is replaced at once. Rows that are used once show no gap, so that this number
        stays. It is the gap on the rows of the first process, for all processes.
        """
        value, error, loss, refills = processes.broadcast((gap.value, gap.error, gap.loss, gap.refills))
        if value is None or refills <= self._heeded:
            return
        self._heeded = refills
        learned = value > max(2 * error, _GAP_SHARE * loss)
        self.now = max(1, self.now - 1) if learned else min(_MOST, self.now + 1)

    def state_dict(self) -> dict[str, int]:
        """The number, and how much of the gap it has followed."""
        return {"uses_now": self.now, "heeded": self._heeded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there; a number that is given stays."""
        if self.is_auto:
            self.now, self._heeded = state["uses_now"], state["heeded"]
