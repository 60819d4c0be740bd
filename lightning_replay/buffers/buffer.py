"""The replay buffer: rows of tokens in preallocated CPU memory. It doesn't depend on Lightning."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_replay.buffers.cursor import Cursor, Overwritten
from lightning_replay.buffers.files import read_state, write_state
from lightning_replay.buffers.policies import Policy, place, policy_of, saved_policy
from lightning_replay.buffers.rows import ReplayRows, checked_rows, pack_tokens, unpack_tokens
from lightning_replay.buffers.state import FORMAT, ROWS, checked_state, damaged
from lightning_replay.utilities.validation import is_whole

__all__ = ["ReplayBuffer"]


class ReplayBuffer:
    """A fixed number of token rows to replay, kept in CPU memory as 32-bit ids.

    Rows are drawn at random in passes: every row is drawn once before any is drawn twice. A new row joins the current
    pass. ``unused`` is the number of rows left in it. To use each row exactly once (as arXiv 2605.26097 does), add new
    rows when ``unused`` reaches zero.

    All randomness comes from the buffer's own generator; torch's global random state never changes.

    Each call changes the buffer completely or, if an exception such as Ctrl-C interrupts it, not at all. A signal
    handler can save the state at any moment; it then saves the state from before the interrupted call.

    A token takes 4 bytes, its target mask included, and each cached log-probability 6.

    Args:
        capacity: The maximum number of rows.
        length: Tokens in a row. Shorter rows are padded, longer ones refused.
        policy: Which rows a full buffer keeps. ``"fifo"``: the newest; each new row replaces the oldest.
            ``"reservoir"``: a uniform sample of all rows ever added (Vitter 1985, algorithm R). Or a ``Policy`` object.
        seed: Seed of the order in which rows are drawn and of the policy's random choices.
        top_k: How many of the reference's likeliest tokens are stored with each position; 0 for none.

    Raises:
        ValueError: If ``capacity`` is below 1, ``length`` below 2, ``top_k`` below 0, or ``policy`` is unknown or has
            the name of a built-in policy without being it.

    Example:
        >>> buffer = ReplayBuffer(capacity=4, length=3)
        >>> buffer.add(torch.tensor([[1, 2, 3], [4, 5, 6]]))
        >>> len(buffer), buffer.unused
        (2, 2)
        >>> sorted(buffer.draw(2).tokens.tolist())
        [[1, 2, 3], [4, 5, 6]]
        >>> buffer.unused
        0
    """

    def __init__(
        self, capacity: int, length: int, policy: str | Policy = "fifo", seed: int = 0, top_k: int = 0
    ) -> None:
        if not is_whole(capacity, 1):
            raise ValueError(f"`capacity` is the number of rows that the buffer holds, at least 1; got {capacity!r}.")
        if not is_whole(length, 2):
            raise ValueError(f"`length` is the number of tokens in a row, at least 2; got {length!r}.")
        policy = policy_of(policy)
        if not is_whole(top_k, 0):
            raise ValueError(f"`top_k` is the number of log-probabilities per position, at least 0; got {top_k!r}.")
        self.capacity = int(capacity)
        self.length = int(length)
        self.policy = policy
        self.top_k = int(top_k)
        self._columns = {
            "uses": torch.zeros(capacity, dtype=torch.int32),
            "tokens": torch.zeros(capacity, length, dtype=torch.int32),  # packed with their targets
            "lengths": torch.zeros(capacity, dtype=torch.int32),
            "steps": torch.zeros(capacity, dtype=torch.int64),
            "top_ids": torch.zeros(capacity, length - 1, top_k, dtype=torch.int32),
            "top_log_probs": torch.zeros(capacity, length - 1, top_k + 1 if top_k else 0, dtype=torch.float16),
        }
        self._cursor = Cursor.first(seed)

    def __len__(self) -> int:
        """The number of rows held."""
        return min(self._cursor.seen, self.capacity)

    @property
    def unused(self) -> int:
        """The number of rows that the current pass has yet to draw."""
        return len(self._cursor.deck)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for rows: 4 per token, 16 per row and 6 per cached log-probability, filled or not."""
        return sum(column.nbytes for column in self._columns.values())

    @property
    def max_token(self) -> int:
        """The largest token id held, cached ones included; -1 if the buffer is empty."""
        if not len(self):
            return -1
        tokens, _ = unpack_tokens(self._column("tokens"))
        return max(int(tokens.max()), int(self._column("top_ids").max()) if self.top_k else -1)

    def left(self, uses: int) -> int:
        """How many rows can be drawn before each has been drawn ``uses`` times since rows were last added."""
        cursor = self._cursor
        return max(0, len(cursor.deck) + (uses - 1 - cursor.passes) * len(self))

    def add(
        self,
        rows: Tensor | ReplayRows,
        lengths: Tensor | None = None,
        step: int = 0,
        uses: Tensor | None = None,
    ) -> None:
        """Store rows in order: all of them or, if an exception such as Ctrl-C interrupts the call, none.

        Args:
            rows: Token ids, shape ``(rows, length)``, any integer type; or ``ReplayRows`` with their targets and
                cached log-probabilities, if any. Rows narrower than the buffer's are padded on the right.
            lengths: Number of real tokens in each row of a tensor, shape ``(rows,)``. Default: the whole row.
            step: The optimizer step at which they are added.
            uses: How often each has been drawn before, shape ``(rows,)``. Default: never.

        Raises:
            TypeError: If ``rows`` is neither a tensor nor ``ReplayRows``.
            ValueError: If the shapes don't fit, an id is negative or takes more than 31 bits, a length is outside
                ``[1, length]``, or the number of log-probabilities isn't the buffer's ``top_k``.
        """
        if not isinstance(rows, (Tensor, ReplayRows)):
            raise TypeError(
                "The buffer takes a tensor of token ids, rows padded on the right with their `lengths`, or ReplayRows; "
                f"got {type(rows).__name__}. `torch.nn.utils.rnn.pad_sequence` makes one tensor of ragged rows."
            )
        if isinstance(rows, Tensor):
            every = torch.full(rows.shape[:1], rows.shape[-1] if rows.dim() else 0)
            rows = ReplayRows(rows, every if lengths is None else lengths)
        rows = checked_rows(rows, self.length, self.top_k)
        cursor, arriving = self._cursor, len(rows.tokens)
        generator = cursor.random()
        slots, kept = place(self.policy, cursor.seen, arriving, self.capacity, generator)
        rows = rows.take(kept).widened(self.length)
        tokens = rows.tokens.masked_fill(~rows.mask, 0).to(torch.int32)
        values = {
            "uses": torch.zeros(len(slots), dtype=torch.int32) if uses is None else uses.to(torch.int32)[kept],
            "tokens": pack_tokens(tokens, rows.target_tokens),
            "lengths": rows.lengths.to(torch.int32),
            "steps": torch.full((len(slots),), step, dtype=torch.int64),
        }
        if rows.top_ids is not None and rows.top_log_probs is not None:
            values |= {
                "top_ids": rows.top_ids.to(torch.int32),
                "top_log_probs": rows.top_log_probs.to(torch.float16),
            }
        self._write(slots, values, cursor.added(arriving, slots, self.capacity, generator))

    def renew(self) -> None:
        """Begin a new pass over all rows and count uses for ``left`` from zero, as if all had just been added."""
        self._cursor = self._cursor.renewed(len(self))

    def draw(self, rows: int) -> ReplayRows:
        """Take rows at random, without replacement within a pass.

        If the current pass has fewer rows left than requested, new passes begin as needed. If more rows are requested
        than the buffer holds, some are therefore returned more than once.

        Args:
            rows: The number of rows.

        Returns:
            Copies of the rows, on the CPU.

        Raises:
            ValueError: If the buffer is empty or ``rows`` is negative.
        """
        if not is_whole(rows, 0):
            raise ValueError(f"`rows` is how many rows to draw, at least 0; got {rows!r}.")
        if rows and not len(self):
            raise ValueError("The replay buffer is empty: add rows before drawing from it.")
        slots, after = self._cursor.drawn(rows, len(self))
        drawn, times = slots.unique(return_counts=True)  # type: ignore[no-untyped-call]
        self._write(drawn, {"uses": self._column("uses")[drawn] + times.to(torch.int32)}, after)
        stored = {name: column[slots] for name, column in self._columns.items()}
        tokens, targets = unpack_tokens(stored["tokens"])
        return ReplayRows(
            tokens=tokens.long(),
            lengths=stored["lengths"].long(),
            targets=targets,
            top_ids=stored["top_ids"].long() if self.top_k else None,
            top_log_probs=stored["top_log_probs"] if self.top_k else None,
            uses=stored["uses"],
            steps=stored["steps"],
        )

    def with_cache(self, cache: Callable[[ReplayRows], ReplayRows]) -> "ReplayBuffer":
        """A buffer with the same rows in the same state that also stores cached log-probabilities.

        Args:
            cache: Returns the rows that it receives with ``top_ids`` and ``top_log_probs``.
        """
        state = self.state_dict()
        tokens, targets = unpack_tokens(state["tokens"])
        rows = cache(ReplayRows(tokens.long(), state["lengths"].long(), targets))
        assert rows.top_ids is not None
        assert rows.top_log_probs is not None
        cached = {
            "top_k": rows.top_ids.shape[2],
            "top_ids": rows.top_ids.to(torch.int32),
            "top_log_probs": rows.top_log_probs.to(torch.float16),
        }
        return self.from_state_dict(state | cached, self.policy)

    def state_dict(self, rows: bool = True) -> dict[str, Any]:
        """The state to continue from exactly: tensors, numbers and strings only.

        A call that is under way does not count: the state is then the one from before it. The policy is stored by name.

        Args:
            rows: Whether to include the rows. Without them, the state fits a buffer that holds the same rows.
        """
        cursor = self._cursor
        state: dict[str, Any] = {
            "format": FORMAT,
            "capacity": self.capacity,
            "length": self.length,
            "policy": self.policy.name,
            "top_k": self.top_k,
            "seen": cursor.seen,
            "passes": cursor.passes,
            "deck": cursor.deck.clone(),
            "generator": cursor.generator.clone(),
        }
        return state | {name: self._column(name).clone() for name in ("uses", *(ROWS if rows else ()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned, now or in an earlier version of its format.

        Until the call ends, the rows that the buffer held before take memory of their own.

        Raises:
            ValueError: If the state is from a buffer of another capacity, length, policy or ``top_k``, or from a
                later version, or is damaged; the buffer is then unchanged.
        """
        state = checked_state(state)
        ours = {"capacity": self.capacity, "length": self.length, "policy": self.policy.name, "top_k": self.top_k}
        theirs = {key: state[key] for key in ours}
        if ours != theirs:
            raise ValueError(f"The saved replay buffer is {theirs}, this one is {ours}: make it like the saved one.")
        filled = min(state["seen"], self.capacity)
        if "tokens" not in state and filled != len(self):
            raise ValueError(
                f"The state is from a buffer of {filled} rows and was saved without them, but this buffer holds "
                f"{len(self)} rows: fill it with the same rows first."
            )
        names = ("uses", *(ROWS if "tokens" in state else ()))
        values = {
            name: state[name] if name in state else torch.zeros_like(self._columns[name][:filled]) for name in names
        }
        after = Cursor(state["seen"], state["passes"], state["deck"].clone(), state["generator"].clone())
        self._write(torch.arange(filled), values, after)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], policy: Policy | None = None) -> "ReplayBuffer":
        """A new buffer in the state that ``state_dict`` returned.

        Args:
            state: The state, which holds the policy's name only.
            policy: The policy, with the settings of the saved buffer's. Needed for a policy that is not built in.

        Raises:
            ValueError: If the state is from a later version, is damaged, or its buffer doesn't fit into memory; or if
                the policy's name in the state isn't that of ``policy`` or, without one, of a built-in policy.
        """
        state = checked_state(state)
        if "tokens" not in state:
            raise damaged("it has no rows")
        policy = saved_policy(state["policy"], policy)
        try:
            buffer = cls(state["capacity"], state["length"], policy, top_k=state["top_k"])
        except (RuntimeError, MemoryError) as error:
            raise damaged(f"there is no memory for its {state['capacity']} rows of {state['length']}") from error
        buffer.load_state_dict(state)
        return buffer

    def save(self, path: str | Path) -> None:
        """Write the buffer to a file, completely or not at all: if saving fails, an earlier file is unchanged.

        Args:
            path: A ``.safetensors`` file, which is smaller and loads faster; or a ``.parquet`` file, which other tools
                read: a row for each row of the buffer, with ``tokens``, ``targets``, ``length``, ``uses``, ``step``
                and, if the buffer stores log-probabilities, ``top_ids`` and ``top_log_probs``.

        Raises:
            ValueError: If the path has another suffix.
            OSError: If the file can't be written.

        Example:
            >>> import tempfile
            >>> buffer = ReplayBuffer(capacity=4, length=3)
            >>> buffer.add(torch.tensor([[1, 2, 3], [4, 5, 6]]))
            >>> path = Path(tempfile.mkdtemp()) / "rows.parquet"
            >>> buffer.save(path)
            >>> twin = ReplayBuffer.load(path)
            >>> bool((twin.draw(1).tokens == buffer.draw(1).tokens).all())
            True
        """
        write_state(path, self.state_dict())

    @classmethod
    def load(cls, path: str | Path, policy: Policy | None = None) -> "ReplayBuffer":
        """A buffer from a file that ``save`` wrote; it continues exactly as the saved one would have.

        Args:
            path: The ``.safetensors`` or ``.parquet`` file.
            policy: The policy, with the settings of the saved buffer's. Needed for a policy that is not built in.

        Raises:
            ValueError: If the path has another suffix, the file is damaged, altered or not a buffer's, or the policy's
                name in the file isn't that of ``policy`` or, without one, of a built-in policy. Nothing in a file is
                unpickled or executed.
            FileNotFoundError: If there is no such file.
        """
        state = read_state(path)
        try:
            return cls.from_state_dict(state, policy)
        except ValueError as error:
            raise ValueError(f"{path} can't be loaded. {error}") from error

    def _column(self, name: str) -> Tensor:
        """A column of the rows held; while a write is under way, a copy with the values from before it."""
        column, overwritten = self._columns[name][: len(self)], self._cursor.overwritten
        if overwritten is None or name not in overwritten.values:
            return column
        return column.index_copy(0, overwritten.slots, overwritten.values[name])

    def _write(self, slots: Tensor, values: dict[str, Tensor], after: Cursor) -> None:
        """Write to columns in place, at slots that differ, and replace the cursor at the end.

        Until then, the buffer's state is the one from before: the cursor holds what the slots contained.
        """
        self._restore()
        held = slots[slots < len(self)]
        overwritten = Overwritten(held, {name: self._columns[name][held] for name in values})
        self._cursor = self._cursor._replace(overwritten=overwritten)
        for name, column in values.items():
            self._columns[name].index_copy_(0, slots, column)
        self._cursor = after

    def _restore(self) -> None:
        """Undo what an interrupted call wrote."""
        overwritten = self._cursor.overwritten
        if overwritten is not None:
            for name, column in overwritten.values.items():
                self._columns[name].index_copy_(0, overwritten.slots, column)
            self._cursor = self._cursor._replace(overwritten=None)
