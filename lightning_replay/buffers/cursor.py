"""The position of a replay buffer in its passes, as one immutable object that each change replaces."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Cursor", "Overwritten"]


class Overwritten(NamedTuple):
    """What a buffer's slots held before a write that is under way.

    Attributes:
        slots: The slots, each once.
        values: For each column to be written, the values at these slots.
    """

    slots: Tensor
    values: dict[str, Tensor]


class Cursor(NamedTuple):
    """All that changes in a buffer except its rows. No tensor in it is ever written to.

    A buffer replaces its cursor in one assignment, so that an interrupt finds either the old or the new one.

    Attributes:
        seen: Number of rows ever added.
        passes: Number of passes begun since rows were last added.
        deck: Slots that the current pass has yet to draw, in random order; the last one is drawn first.
        generator: State of the random generator.
        overwritten: What to restore if the write under way is interrupted; None if there is no such write.
    """

    seen: int
    passes: int
    deck: Tensor
    generator: Tensor
    overwritten: Overwritten | None = None

    @classmethod
    def first(cls, seed: int) -> "Cursor":
        """The cursor of an empty buffer."""
        return cls(0, 0, torch.empty(0, dtype=torch.int64), torch.Generator().manual_seed(seed).get_state())

    def random(self) -> torch.Generator:
        """A new generator in the cursor's state."""
        generator = torch.Generator()
        generator.set_state(self.generator)
        return generator

    def added(self, arriving: int, slots: Tensor, capacity: int, generator: torch.Generator) -> "Cursor":
        """The cursor after an addition.

        Args:
            arriving: Number of new rows, dropped ones included.
            slots: The slots that new rows went to; these rows join the current pass.
            capacity: Number of slots.
            generator: The cursor's generator, after the policy has used it.
        """
        waiting = torch.zeros(capacity, dtype=torch.bool)
        waiting[self.deck] = True
        waiting[slots] = True
        deck = _shuffled(waiting.nonzero().squeeze(1), generator)
        return Cursor(self.seen + arriving, 0, deck, generator.get_state())

    def renewed(self, held: int) -> "Cursor":
        """The cursor at the start of a first pass over the ``held`` rows."""
        return self._with_new_deck(held)._replace(passes=0)

    def drawn(self, rows: int, held: int) -> tuple[Tensor, "Cursor"]:
        """The slots of the next ``rows`` rows, and the cursor after drawing them from a buffer of ``held`` rows."""
        cursor = self
        slots = [self.deck[:0]]
        missing = rows
        while missing:
            if not len(cursor.deck):
                cursor = cursor._with_new_deck(held)._replace(passes=cursor.passes + 1)
            slots.append(cursor.deck[-missing:])
            cursor = cursor._replace(deck=cursor.deck[:-missing])
            missing -= len(slots[-1])
        return torch.cat(slots), cursor._replace(overwritten=None)

    def _with_new_deck(self, held: int) -> "Cursor":
        generator = self.random()
        deck = _shuffled(torch.arange(held), generator)
        return self._replace(deck=deck, generator=generator.get_state())


def _shuffled(slots: Tensor, generator: torch.Generator) -> Tensor:
    return slots[torch.randperm(len(slots), generator=generator)]
