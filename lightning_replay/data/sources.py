"""Where replay rows come from: a buffer, a folder of shards, real prior rows, or a mix of two."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl

from lightning_replay.buffers.buffer import ReplayBuffer
from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.buffers.shards import ReplayShards
from lightning_replay.utilities.distributed import Processes

__all__ = ["BufferRows", "MixedRows", "RowSource", "ShardRows"]


class RowSource(ABC):
    """A source of replay rows. All ranks draw the same rows; each then takes its part of them."""

    @property
    def is_empty(self) -> bool:
        """Whether there are no rows to draw and never will be; batches then stay unchanged."""
        return False

    def prepare(self, batch: Any) -> None:  # noqa: B027
        """Make ready what can't wait for the first draw; called before each batch. By default, do nothing."""

    @abstractmethod
    def draw(self, rows: int, batch: Any) -> ReplayRows:
        """Draw rows.

        Args:
            rows: How many, at least 1.
            batch: The batch of new rows that they go with.

        Returns:
            That many rows, on the CPU.
        """

    def measures(self) -> dict[str, float]:
        """What to log at each logging step, by key. By default nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What is needed to continue: tensors and plain containers. By default nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from there. By default, do nothing."""


class BufferRows(RowSource):
    """The rows of a buffer, in passes: each row is drawn once before any is drawn twice.

    Args:
        buffer: The buffer.
    """

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer

    @property
    def is_empty(self) -> bool:
        """Whether the buffer holds no row."""
        return not len(self.buffer)

    def draw(self, rows: int, batch: Any) -> ReplayRows:
        """Draw rows from the buffer."""
        return self.buffer.draw(rows)


class ShardRows(RowSource):
    """Rows that were generated ahead, read from their folder when they are due.

    Args:
        shards: The folder.
    """

    def __init__(self, shards: ReplayShards) -> None:
        self.shards = shards
        self.buffer: ReplayBuffer | None = None
        """The rows read last."""
        self._uses = 1
        self._trainer: pl.Trainer | None = None
        self._processes = Processes()

    def begin(self, trainer: pl.Trainer, processes: Processes) -> None:
        """Read for a fit, in all of its processes the same rows."""
        self._trainer, self._processes = trainer, processes

    def use(self, uses: int, log_probs: bool) -> None:
        """Set how rows are used.

        Args:
            uses: How often each row is drawn before the next ones are read.
            log_probs: Whether to read the log-probabilities kept with the rows as well.
        """
        self._uses = uses
        self.shards.with_log_probs = log_probs

    def draw(self, rows: int, batch: Any) -> ReplayRows:
        """Draw rows; when all that were read are used, read the next ones."""
        parts: list[ReplayRows] = []
        while rows:
            if self.buffer is None or not self.buffer.left(self._uses):
                self._read()
            assert self.buffer is not None
            parts.append(self.buffer.draw(min(rows, self.buffer.left(self._uses))))
            rows -= len(parts[-1].tokens)
        return ReplayRows.cat(parts)

    def measures(self) -> dict[str, float]:
        """How full the buffer of rows read last is."""
        return {} if self.buffer is None else {"replay/buffer_fill": len(self.buffer) / self.buffer.capacity}

    def state_dict(self) -> dict[str, Any]:
        """How far reading has come, and the rows read last."""
        return {"shards": self.shards.state_dict(), "buffer": None if self.buffer is None else self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self.shards.load_state_dict(state["shards"])
        self.buffer = None if state["buffer"] is None else ReplayBuffer.from_state_dict(state["buffer"])

    def _read(self) -> None:
        shards = self.shards
        rows = self._processes.run_on_all_ranks(shards.next_rows)
        assert rows.uses is not None
        if self.buffer is None:
            self.buffer = ReplayBuffer(shards.read_rows, shards.length, seed=shards.order_seed, top_k=shards.top_k_read)
        step = 0 if self._trainer is None else self._trainer.global_step
        self.buffer.add(rows, step=step, uses=rows.uses * self._uses)


class MixedRows(RowSource):
    """Rows of two sources in exact shares: what a draw owes in fractions of a row is carried over to the next one.

    If one of them is empty, all rows come from the other.

    Args:
        prior: Real prior rows.
        share: Share of the rows that are real, in (0, 1].
        other: The source of the other rows; None for none.
    """

    def __init__(self, prior: RowSource, share: float, other: RowSource | None) -> None:
        self.prior = prior
        self.other = other
        self._share = Fraction(float(share)).limit_denominator(1_000_000)
        self._drawn = 0

    @property
    def is_empty(self) -> bool:
        """Whether both are empty."""
        return self.prior.is_empty and (self.other is None or self.other.is_empty)

    def prepare(self, batch: Any) -> None:
        """Make the other source ready, if it will be drawn from."""
        if self.other is not None and self._share < 1:
            self.other.prepare(batch)

    def draw(self, rows: int, batch: Any) -> ReplayRows:
        """Draw from both."""
        if self.other is None or self.other.is_empty:
            return self.prior.draw(rows, batch)
        before = int(self._drawn * self._share)
        self._drawn += rows
        real = int(self._drawn * self._share) - before
        parts = [self.prior.draw(real, batch)] if real else []
        if real < rows:
            parts.append(self.other.draw(rows - real, batch))
        return ReplayRows.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """How many rows have been drawn; the two sources have states of their own."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self._drawn = state["drawn"]
