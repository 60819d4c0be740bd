"""The replay buffer: rows of tokens in preallocated CPU memory. It knows nothing of Lightning."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_replay.buffers.files import read_state, write_state
from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.buffers.state import FORMAT, ROWS, Policy, checked_state, damaged
from lightning_replay.utilities.validation import are_ids, check_choice, is_integer, is_whole

__all__ = ["ReplayBuffer"]

_LARGEST_TOKEN = 2**31 - 1


class ReplayBuffer:
    """A fixed number of token rows to replay, kept in CPU memory as 32-bit ids.

    Rows are drawn at random in passes: every row is drawn once before any is drawn twice. A row that is added
    joins the pass under way. ``unused`` tells how many rows of the pass are left, so that whoever fills the
    buffer can use each row exactly once (as arXiv 2605.26097 does) by adding new rows when it reaches zero.

    All randomness comes from the buffer's own generator; torch's global random state is never touched.

    A token takes 4 bytes, its place among the targets included, and each cached log-probability 6.

    Args:
        capacity: The number of rows it holds at most.
        length: Tokens in a row. Shorter rows are padded, longer ones refused.
        policy: What gives way when the buffer is full. ``"fifo"``: the oldest row. ``"reservoir"``: a random row,
            or the new one itself, so that at any time the buffer is a uniform sample of all rows ever added
            (Vitter 1985, algorithm R).
        seed: Seed of the order in which rows are drawn and, with ``"reservoir"``, of what is kept.
        top_k: How many of the reference's likeliest tokens are kept with each position; 0 for none.

    Raises:
        ValueError: If ``capacity`` is below 1, ``length`` below 2, ``top_k`` below 0, or ``policy`` is unknown.

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

    def __init__(self, capacity: int, length: int, policy: Policy = "fifo", seed: int = 0, top_k: int = 0) -> None:
        if not is_whole(capacity, 1):
            raise ValueError(f"`capacity` is the number of rows that the buffer holds, at least 1; got {capacity!r}.")
        if not is_whole(length, 2):
            raise ValueError(f"`length` is the number of tokens in a row, at least 2; got {length!r}.")
        check_choice("policy", policy, Policy)
        if not is_whole(top_k, 0):
            raise ValueError(f"`top_k` is how many log-probabilities to keep with a token, at least 0; got {top_k!r}.")
        self.capacity = int(capacity)
        self.length = int(length)
        self.policy: Policy = policy
        self.top_k = int(top_k)
        self._generator = torch.Generator().manual_seed(seed)
        # A token that is no target stands as its bitwise complement, so that the mask takes no memory of its own.
        self._tokens = torch.zeros(capacity, length, dtype=torch.int32)
        self._lengths = torch.zeros(capacity, dtype=torch.int32)
        self._uses = torch.zeros(capacity, dtype=torch.int32)
        self._steps = torch.zeros(capacity, dtype=torch.int64)
        self._top_ids = torch.zeros(capacity, length - 1, top_k, dtype=torch.int32)
        self._top_log_probs = torch.zeros(capacity, length - 1, top_k + 1 if top_k else 0, dtype=torch.float16)
        self._seen = 0
        self._passes = 0
        # Slots that the pass under way has not drawn yet, in the (random) order in which it will, from the end.
        self._deck = torch.empty(0, dtype=torch.int64)
        # Rows that an addition under way writes over; None outside of one.
        self._overwritten: tuple[Tensor, dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        """The number of rows held."""
        return min(self._seen, self.capacity)

    @property
    def unused(self) -> int:
        """How many rows the pass under way has not drawn yet."""
        return len(self._deck)

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take, filled or not: 4 a token, 16 a row and 6 a cached log-probability."""
        return sum(getattr(self, f"_{name}").nbytes for name in ("uses", *ROWS))

    @property
    def max_token(self) -> int:
        """The largest token id held, cached ones included; -1 when empty."""
        self._take_back()
        if not len(self):
            return -1
        cached = self._top_ids[: len(self)]
        return max(int(_ids(self._tokens[: len(self)]).max()), int(cached.max()) if self.top_k else -1)

    def left(self, uses: int) -> int:
        """How many rows can be drawn until each has been ``uses`` times since rows were last added."""
        return max(0, len(self._deck) + (uses - 1 - self._passes) * len(self))

    def add(
        self,
        rows: Tensor | ReplayRows,
        lengths: Tensor | None = None,
        step: int = 0,
        uses: Tensor | None = None,
    ) -> None:
        """Store rows, in order: all of them or, where an exception such as Ctrl-C comes in between, none.

        Args:
            rows: Token ids, shape ``(rows, length)``, any integer type; or ``ReplayRows``, with targets and
                cached log-probabilities where they have them. Rows narrower than the buffer's are padded on the right.
            lengths: Real tokens in each row of a tensor, shape ``(rows,)``. All of the row if left out.
            step: The optimizer step at which they are added.
            uses: How often each has been drawn before, shape ``(rows,)``; never, if left out.

        Raises:
            TypeError: If ``rows`` is neither a tensor nor ``ReplayRows``.
            ValueError: If the shapes don't fit, an id is negative or takes more than 31 bits, a length is outside
                ``[1, length]``, or the log-probabilities are not those that the buffer keeps.
        """
        if not isinstance(rows, (Tensor, ReplayRows)):
            raise TypeError(
                "The buffer takes a tensor of token ids, rows padded on the right with their `lengths`, or ReplayRows; "
                f"got {type(rows).__name__}. `torch.nn.utils.rnn.pad_sequence` makes one tensor of ragged rows."
            )
        if isinstance(rows, Tensor):
            every = torch.full(rows.shape[:1], rows.shape[-1] if rows.dim() else 0)
            rows = ReplayRows(rows, every if lengths is None else lengths)
        rows = self._checked(rows)
        self._take_back()
        arrived = len(rows.tokens)
        generator = torch.Generator()
        generator.set_state(self._generator.get_state())
        slots, kept = self._slots(arrived, generator)
        rows = rows.take(kept).widened(self.length)
        targets = rows.mask if rows.targets is None else rows.mask & rows.targets
        tokens = rows.tokens.masked_fill(~rows.mask, 0).to(torch.int32)
        self._overwritten = slots, {name: getattr(self, f"_{name}")[slots] for name in ("uses", *ROWS)}
        self._tokens[slots] = torch.where(targets, tokens, ~tokens)
        self._lengths[slots] = rows.lengths.to(torch.int32)
        self._uses[slots] = 0 if uses is None else uses.to(torch.int32)[kept]
        self._steps[slots] = step
        if rows.top_ids is not None and rows.top_log_probs is not None:
            self._top_ids[slots] = rows.top_ids.to(torch.int32)
            self._top_log_probs[slots] = rows.top_log_probs.to(torch.float16)
        waiting = torch.zeros(self.capacity, dtype=torch.bool)
        waiting[self._deck] = True
        waiting[slots] = True
        deck = _shuffled(waiting.nonzero().squeeze(1), generator)
        # In one call, which no signal interrupts.
        vars(self).update(_seen=self._seen + arrived, _deck=deck, _passes=0, _generator=generator, _overwritten=None)

    def renew(self) -> None:
        """Let every row be drawn as often again as if all had just been added."""
        self._deck = _shuffled(torch.arange(len(self)), self._generator)
        self._passes = 0

    def draw(self, rows: int) -> ReplayRows:
        """Take rows at random, without replacement within a pass.

        Where the pass under way has fewer left than asked for, a new pass begins, as often as needed: asking for
        more rows than the buffer holds returns some of them more than once.

        Args:
            rows: How many.

        Returns:
            Copies of the rows, on the CPU.

        Raises:
            ValueError: If the buffer is empty or ``rows`` is negative.
        """
        if not is_whole(rows, 0):
            raise ValueError(f"`rows` is how many rows to draw, at least 0; got {rows!r}.")
        if rows and not len(self):
            raise ValueError("The replay buffer is empty: add rows before drawing from it.")
        self._take_back()
        drawn: list[Tensor] = []
        missing = rows
        while missing:
            if not len(self._deck):
                self._deck = _shuffled(torch.arange(len(self)), self._generator)
                self._passes += 1
            drawn.append(self._deck[-missing:])
            self._deck = self._deck[:-missing]
            missing = rows - sum(map(len, drawn))
        slots = torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64)
        self._uses.index_add_(0, slots, torch.ones(len(slots), dtype=torch.int32))
        stored = self._tokens[slots]
        return ReplayRows(
            tokens=_ids(stored).long(),
            lengths=self._lengths[slots].long(),
            targets=stored >= 0,
            top_ids=self._top_ids[slots].long() if self.top_k else None,
            top_log_probs=self._top_log_probs[slots] if self.top_k else None,
            uses=self._uses[slots],
            steps=self._steps[slots],
        )

    def with_cache(self, cache: Callable[[ReplayRows], ReplayRows]) -> "ReplayBuffer":
        """A buffer of the same rows in the same state that keeps cached log-probabilities as well.

        Args:
            cache: Returns the rows it is given with ``top_ids`` and ``top_log_probs``.
        """
        self._take_back()
        filled = len(self)
        stored = self._tokens[:filled]
        rows = cache(ReplayRows(_ids(stored).long(), self._lengths[:filled].long(), stored >= 0))
        assert rows.top_ids is not None
        assert rows.top_log_probs is not None
        cached = {
            "top_k": rows.top_ids.shape[2],
            "top_ids": rows.top_ids.to(torch.int32),
            "top_log_probs": rows.top_log_probs.to(torch.float16),
        }
        return self.from_state_dict(self.state_dict() | cached)

    def state_dict(self, rows: bool = True) -> dict[str, Any]:
        """Everything that is needed to go on as if nothing had happened: tensors, numbers and strings only.

        Args:
            rows: Whether the rows are included. Without them, the state fits a buffer that holds the same rows.
        """
        filled = len(self)
        state: dict[str, Any] = {
            "format": FORMAT,
            "capacity": self.capacity,
            "length": self.length,
            "policy": self.policy,
            "top_k": self.top_k,
            "seen": self._seen,
            "passes": self._passes,
            "uses": self._uses[:filled].clone(),
            "deck": self._deck.clone(),
            "generator": self._generator.get_state(),
        }
        if rows:
            state |= {name: getattr(self, f"_{name}")[:filled].clone() for name in ROWS}
        if self._overwritten is not None:  # as before; a signal's handler may be saving while rows are added
            slots, before = self._overwritten
            held = slots < filled
            for name in before.keys() & state.keys():
                state[name][slots[held]] = before[name][held]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned, now or in an earlier version of its format.

        Raises:
            ValueError: If the state was made by a buffer of another capacity, length, policy or cache, or by a
                later version, or is damaged; the buffer is then as it was.
        """
        state = checked_state(state)
        ours = {"capacity": self.capacity, "length": self.length, "policy": self.policy, "top_k": self.top_k}
        theirs = {key: state[key] for key in ours}
        if ours != theirs:
            raise ValueError(f"The saved replay buffer is {theirs}, this one is {ours}: make it like the saved one.")
        filled = min(state["seen"], self.capacity)
        if "tokens" not in state and filled != len(self):
            raise ValueError(
                f"The saved state is that of a buffer of {filled} rows, saved without them, and this one holds "
                f"{len(self)}: fill it with the same rows first."
            )
        self._overwritten = None
        for name in ("uses", *(ROWS if "tokens" in state else ())):
            column: Tensor = getattr(self, f"_{name}").zero_()
            if name in state:
                column[:filled] = state[name]
        self._seen = state["seen"]
        self._passes = state["passes"]
        self._deck = state["deck"].clone()
        self._generator.set_state(state["generator"])

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "ReplayBuffer":
        """A new buffer in the state that ``state_dict`` returned.

        Raises:
            ValueError: If the state was made by a later version, is damaged, or its buffer doesn't fit into memory.
        """
        state = checked_state(state)
        if "tokens" not in state:
            raise damaged("it has no rows")
        try:
            buffer = cls(state["capacity"], state["length"], state["policy"], top_k=state["top_k"])
        except (RuntimeError, MemoryError) as error:
            raise damaged(f"there is no memory for its {state['capacity']} rows of {state['length']}") from error
        buffer.load_state_dict(state)
        return buffer

    def save(self, path: str | Path) -> None:
        """Write the buffer to a file, whole or not at all: after a save that fails, an earlier file is as it was.

        Args:
            path: A ``.safetensors`` file, the smaller and faster one to load; or a ``.parquet`` file, which other tools
                read: a row for each row of the buffer, with ``tokens``, ``targets``, ``length``, ``uses``, ``step``
                and, where log-probabilities are kept, ``top_ids`` and ``top_log_probs``.

        Raises:
            ValueError: If the path ends otherwise.
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
    def load(cls, path: str | Path) -> "ReplayBuffer":
        """A buffer from a file that ``save`` wrote; it goes on bit for bit as the saved one would have.

        Args:
            path: The ``.safetensors`` or ``.parquet`` file.

        Raises:
            ValueError: If the path ends otherwise, or the file is damaged, altered or something else. Nothing in a
                file is unpickled or executed.
            FileNotFoundError: If there is no such file.
        """
        state = read_state(path)
        try:
            return cls.from_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{path} can't be loaded. {error}") from error

    def _take_back(self) -> None:
        """Undo what an interrupted addition has written."""
        if self._overwritten is not None:
            slots, before = self._overwritten
            for name, column in before.items():
                getattr(self, f"_{name}")[slots] = column
            self._overwritten = None

    def _slots(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where each of the next ``rows`` rows goes: slots, and the indices of the rows that go there."""
        arrivals = self._seen + torch.arange(rows)
        if self.policy == "fifo":
            slots = arrivals % self.capacity
        else:
            # Algorithm R: arrival t (from 0) goes to a uniform slot of t + 1; past the capacity, it is dropped.
            lottery = (torch.rand(rows, generator=generator, dtype=torch.float64) * (arrivals + 1)).long()
            slots = torch.where(arrivals < self.capacity, arrivals, lottery)
        # Of several rows that go to one slot, the last one stays.
        last = torch.full((self.capacity,), -1)
        inside = slots < self.capacity
        last.scatter_reduce_(0, slots[inside], torch.arange(rows)[inside], "amax")
        taken = (last >= 0).nonzero().squeeze(1)
        return taken, last[taken]

    def _checked(self, rows: ReplayRows) -> ReplayRows:
        """The rows, if they may be stored, on the CPU."""
        if any(part is not None and part.is_meta for part in rows):
            raise ValueError("The buffer takes rows that hold tokens; got a tensor on the `meta` device, without any.")
        rows = rows.to(torch.device("cpu"))
        tokens, lengths = rows.tokens, rows.lengths
        if not are_ids(tokens) or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(
                f"The buffer takes integer ids of shape (rows, up to {self.length}); "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        tokens = tokens.long()
        if tokens.numel() and int(tokens.min()) < 0:
            raise ValueError(f"Token ids are at least 0; got {int(tokens.min())}.")
        if tokens.numel() and int(tokens.max()) > _LARGEST_TOKEN:
            raise ValueError(f"The buffer keeps token ids in 31 bits, up to {_LARGEST_TOKEN}; got {int(tokens.max())}.")
        if lengths.shape != tokens.shape[:1] or not is_integer(lengths):
            raise ValueError(
                f"`lengths` has a whole number for each of {len(tokens)} rows; "
                f"got {lengths.dtype} of shape {tuple(lengths.shape)}."
            )
        if lengths.numel() and not (int(lengths.min()) >= 1 and int(lengths.max()) <= tokens.shape[1]):
            raise ValueError(f"Lengths of rows of {tokens.shape[1]} tokens lie in 1 to that; got {lengths.tolist()}.")
        if rows.targets is not None and (rows.targets.shape != tokens.shape or rows.targets.dtype != torch.bool):
            raise ValueError(
                f"`targets` is a boolean tensor of the tokens' shape {tuple(tokens.shape)}; "
                f"got {rows.targets.dtype} of shape {tuple(rows.targets.shape)}."
            )
        cached = 0 if rows.top_ids is None else rows.top_ids.shape[-1]
        if cached != self.top_k:
            raise ValueError(f"The buffer keeps {self.top_k} log-probabilities a position; the rows have {cached}.")
        if rows.top_ids is not None:
            positions = (len(tokens), tokens.shape[1] - 1)
            given = None if rows.top_log_probs is None else tuple(rows.top_log_probs.shape)
            if rows.top_ids.shape[:-1] != positions or given != (*positions, cached + 1):
                raise ValueError(
                    f"`top_ids` has shape {(*positions, cached)} and `top_log_probs` {(*positions, cached + 1)}; "
                    f"got {tuple(rows.top_ids.shape)} and {given}."
                )
        return rows._replace(tokens=tokens)


def _shuffled(slots: Tensor, generator: torch.Generator) -> Tensor:
    return slots[torch.randperm(len(slots), generator=generator)]


def _ids(stored: Tensor) -> Tensor:
    return torch.where(stored < 0, ~stored, stored)
