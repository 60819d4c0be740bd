"""How many replay rows go with a batch of new rows, and which rank takes each of them."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_replay.utilities.validation import check_choice, is_number

__all__ = ["REPLAY_FRACTION", "Deal", "Mode", "ReplayShare"]

REPLAY_FRACTION = 0.1
"""The default share of replay rows; that of arXiv 2605.26097 is 0.2."""

Mode = Literal["append", "replace"]


class Deal(NamedTuple):
    """What becomes of one batch on every rank.

    Attributes:
        kept: Number of new rows that each rank keeps, by rank.
        takers: The rank that takes each of the replay rows that join now.
        batches: Number of batches that these rows are the share of: those that owed them, and the ones before each of
            these that owed less than a row.
    """

    kept: list[int]
    takers: list[int]
    batches: int


class ReplayShare:
    """Keeps the share of replay rows in all batches together at a given fraction.

    The fraction is exact in the long run: what a batch owes in fractions of a row is carried over to the next one.

    Args:
        fraction: Share of replay rows in the mixed batch, in [0, 1).
        mode: ``"append"`` adds replay rows to the new ones. ``"replace"`` keeps the size of the batch: the last new
            rows give way, and at least one stays.

    Raises:
        ValueError: If ``fraction`` is outside [0, 1) or ``mode`` is unknown.

    Example:
        >>> share = ReplayShare(0.2)
        >>> [len(share.deal([6]).takers) for _ in range(4)]  # 1.5 rows are owed for 6 new ones
        [1, 2, 1, 2]
    """

    def __init__(self, fraction: float, mode: Mode = "append") -> None:
        if not is_number(fraction) or not 0 <= fraction < 1:
            raise ValueError(
                f"`replay_fraction` is the share of replay rows in the mixed batch, from 0 to below 1; "
                f"got {fraction!r}."
            )
        check_choice("mode", mode, Mode)
        self.fraction = fraction
        self.mode: Mode = mode
        self._share = Fraction(float(fraction)).limit_denominator(1_000_000)
        self._new_rows = 0
        self._replay_rows = 0
        self._without = 0
        self._held: list[tuple[int, int]] = []

    def deal(self, totals: Sequence[int], carriers: int = 1) -> Deal:
        """Decide on the next batch.

        Args:
            totals: Number of new rows in the batch of each rank.
            carriers: Number of batches, from this one on, that what is owed so far is divided among, in whole batches'
                worth. 0: nothing joins this batch, and what it owes is held for a later one.

        Raises:
            MisconfigurationException: If ``mode="replace"`` and a rank has fewer than two new rows.
        """
        total = sum(totals)
        if self.mode == "append":
            self._new_rows += total
            owed = int(self._new_rows * self._share / (1 - self._share)) - self._replay_rows
            self._replay_rows += owed
            joining, batches = self._due(owed, carriers)
            return Deal(list(totals), _dealt(joining, [joining] * len(totals)), batches)
        if min(totals) < 2:
            raise MisconfigurationException(
                "`mode='replace'` puts replay rows in the place of new ones, but this batch has a single row. Use "
                "`mode='append'`, or larger batches."
            )
        owed = int((self._new_rows + self._replay_rows + total) * self._share) - self._replay_rows
        owed = min(owed, total - len(totals))
        self._new_rows += total - owed
        self._replay_rows += owed
        joining, batches = self._due(owed, 1)
        takers = _dealt(joining, [count - 1 for count in totals])
        return Deal([count - takers.count(rank) for rank, count in enumerate(totals)], takers, batches)

    def replay_rows(self, rows: int) -> float:
        """Number of replay rows that go with so many rows of the user's loader, on average."""
        return rows * (self.fraction / (1 - self.fraction) if self.mode == "append" else self.fraction)

    def drop_held(self) -> None:
        """Forget rows that are owed and have not joined a batch, and the batches that no row has been the share of."""
        self._without, self._held = 0, []

    def state_dict(self) -> dict[str, Any]:
        """Rows seen and owed so far, batches since one owed a row, and what is owed and has not joined yet."""
        return {
            "new_rows": self._new_rows,
            "replay_rows": self._replay_rows,
            "without": self._without,
            "held": list(self._held),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self._new_rows, self._replay_rows = state["new_rows"], state["replay_rows"]
        self._without, self._held = state["without"], list(state["held"])

    def _due(self, owed: int, carriers: int) -> tuple[int, int]:
        """How many rows join a batch that owes some itself, and how many batches they are the share of."""
        self._without += 1
        if owed:
            self._held.append((owed, self._without))
            self._without = 0
        owing = math.ceil(len(self._held) / carriers) if carriers else 0
        due, self._held = self._held[:owing], self._held[owing:]
        return sum(rows for rows, _ in due), sum(batches for _, batches in due)


def _dealt(rows: int, room: Sequence[int]) -> list[int]:
    """The rank that takes each of some rows: each rank in turn, as long as it has room."""
    takers: list[int] = []
    turn = 0
    while len(takers) < rows:
        takers += [rank for rank, places in enumerate(room) if turn < places]
        turn += 1
    return takers[:rows]
