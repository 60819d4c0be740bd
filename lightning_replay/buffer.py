"""The replay buffer: rows of tokens in preallocated CPU memory. It knows nothing of Lightning."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["ReplayBuffer", "ReplayRows"]

Policy = Literal["fifo", "reservoir"]
_FORMAT = 1


class ReplayRows(NamedTuple):
    """Rows of tokens, padded on the right to one length.

    Attributes:
        tokens: Token ids, shape ``(rows, length)``, ``int64``. What stands past a row's length is padding.
        lengths: Number of real tokens in each row, shape ``(rows,)``, ``int64``.

    Example:
        >>> rows = ReplayRows(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2]))
        >>> rows.mask
        tensor([[ True,  True,  True],
                [ True,  True, False]])
        >>> rows.targets_mask
        tensor([[ True,  True],
                [ True, False]])
    """

    tokens: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """True on real tokens, shape ``(rows, length)``."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths.unsqueeze(1)

    @property
    def targets_mask(self) -> Tensor:
        """True where the next token is a real one, shape ``(rows, length - 1)``: the positions a loss is taken at."""
        return self.mask[:, 1:]

    @classmethod
    def cat(cls, parts: Sequence["ReplayRows"]) -> "ReplayRows":
        """Rows of one length, one after another."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.lengths for part in parts]))

    def to(self, device: torch.device) -> "ReplayRows":
        """The same rows on ``device``."""
        return ReplayRows(self.tokens.to(device, non_blocking=True), self.lengths.to(device, non_blocking=True))


class ReplayBuffer:
    """A fixed number of token rows to replay, kept in CPU memory as 32-bit ids.

    Rows are drawn at random in passes: every row is drawn once before any is drawn twice. A row that is added
    joins the pass under way. :attr:`unused` tells how many rows of the pass are left, so that whoever fills the
    buffer can use each row exactly once (as arXiv 2605.26097 does) by adding new rows when it reaches zero.

    All randomness comes from the buffer's own generator; torch's global random state is never touched.

    Args:
        capacity: The number of rows it holds at most.
        length: Tokens in a row. Shorter rows are padded, longer ones refused.
        policy: What gives way when the buffer is full. ``"fifo"``: the oldest row. ``"reservoir"``: a random row,
            or the new one itself, so that at any time the buffer is a uniform sample of all rows ever added
            (Vitter 1985, algorithm R).
        seed: Seed of the order in which rows are drawn and, with ``"reservoir"``, of what is kept.

    Raises:
        ValueError: If ``capacity`` is below 1, ``length`` below 2, or ``policy`` is unknown.

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

    def __init__(self, capacity: int, length: int, policy: Policy = "fifo", seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"`capacity` is the number of rows that the buffer holds, at least 1; got {capacity}.")
        if length < 2:
            raise ValueError(f"`length` is the number of tokens in a row, at least 2; got {length}.")
        if policy not in get_args(Policy):
            raise ValueError(f"`policy` is one of {', '.join(map(repr, get_args(Policy)))}; got {policy!r}.")
        self.capacity = capacity
        self.length = length
        self.policy: Policy = policy
        self._generator = torch.Generator().manual_seed(seed)
        self._tokens = torch.zeros(capacity, length, dtype=torch.int32)
        self._lengths = torch.zeros(capacity, dtype=torch.int32)
        self._seen = 0
        # Slots that the pass under way has not drawn yet, in the (random) order in which it will, from the end.
        self._deck = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """The number of rows held."""
        return min(self._seen, self.capacity)

    @property
    def unused(self) -> int:
        """How many rows the pass under way has not drawn yet."""
        return len(self._deck)

    @property
    def max_token(self) -> int:
        """The largest token id held; -1 when empty."""
        return int(self._tokens[: len(self)].max()) if len(self) else -1

    def add(self, tokens: Tensor, lengths: Tensor | None = None) -> None:
        """Store rows, in order.

        Args:
            tokens: Token ids, shape ``(rows, length)``, any integer type. Rows narrower than the buffer's are
                padded on the right.
            lengths: Real tokens in each row, shape ``(rows,)``. All of the row if left out.

        Raises:
            ValueError: If the shapes don't fit, an id is negative, or a length is outside ``[1, length]``.
        """
        self._check(tokens, lengths)
        rows, width = tokens.shape
        if lengths is None:
            lengths = torch.full((rows,), width)
        slots, kept = self._slots(rows)
        self._tokens[slots, :width] = tokens[kept].to("cpu", torch.int32)
        self._tokens[slots, width:] = 0
        self._lengths[slots] = lengths[kept].to("cpu", torch.int32)
        self._seen += rows
        waiting = torch.zeros(self.capacity, dtype=torch.bool)
        waiting[self._deck] = True
        waiting[slots] = True
        self._deck = self._shuffled(waiting.nonzero().squeeze(1))

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
        if rows < 0:
            raise ValueError(f"`rows` is how many rows to draw, at least 0; got {rows}.")
        if rows and not len(self):
            raise ValueError("The replay buffer is empty: add rows before drawing from it.")
        drawn: list[Tensor] = []
        missing = rows
        while missing:
            if not len(self._deck):
                self._deck = self._shuffled(torch.arange(len(self)))
            drawn.append(self._deck[-missing:])
            self._deck = self._deck[:-missing]
            missing = rows - sum(map(len, drawn))
        slots = torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64)
        return ReplayRows(self._tokens[slots].long(), self._lengths[slots].long())

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on as if nothing had happened: tensors, numbers and strings only."""
        filled = len(self)
        return {
            "format": _FORMAT,
            "capacity": self.capacity,
            "length": self.length,
            "policy": self.policy,
            "seen": self._seen,
            "tokens": self._tokens[:filled].clone(),
            "lengths": self._lengths[:filled].clone(),
            "deck": self._deck.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state was made by a buffer of another capacity, length, policy or format.
        """
        ours = {"format": _FORMAT, "capacity": self.capacity, "length": self.length, "policy": self.policy}
        theirs = {key: state.get(key) for key in ours}
        if ours != theirs:
            raise ValueError(f"The saved replay buffer is {theirs}, this one is {ours}: make it like the saved one.")
        filled = len(state["tokens"])
        self._tokens.zero_()[:filled] = state["tokens"]
        self._lengths.zero_()[:filled] = state["lengths"]
        self._seen = state["seen"]
        self._deck = state["deck"].clone()
        self._generator.set_state(state["generator"].cpu())

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "ReplayBuffer":
        """A new buffer in the state that :meth:`state_dict` returned."""
        buffer = cls(state["capacity"], state["length"], state["policy"])
        buffer.load_state_dict(state)
        return buffer

    def _slots(self, rows: int) -> tuple[Tensor, Tensor]:
        """Where each of the next ``rows`` rows goes: slots, and the indices of the rows that go there."""
        arrivals = self._seen + torch.arange(rows)
        if self.policy == "fifo":
            slots = arrivals % self.capacity
        else:
            # Algorithm R: arrival t (from 0) goes to a uniform slot of t + 1; past the capacity, it is dropped.
            lottery = (torch.rand(rows, generator=self._generator, dtype=torch.float64) * (arrivals + 1)).long()
            slots = torch.where(arrivals < self.capacity, arrivals, lottery)
        # Of several rows that go to one slot, the last one stays.
        last = torch.full((self.capacity,), -1)
        inside = slots < self.capacity
        last.scatter_reduce_(0, slots[inside], torch.arange(rows)[inside], "amax")
        taken = (last >= 0).nonzero().squeeze(1)
        return taken, last[taken]

    def _shuffled(self, slots: Tensor) -> Tensor:
        return slots[torch.randperm(len(slots), generator=self._generator)]

    def _check(self, tokens: Tensor, lengths: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.is_floating_point() or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(
                f"The buffer takes integer ids of shape (rows, up to {self.length}); "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        if tokens.numel() and int(tokens.min()) < 0:
            raise ValueError(f"Token ids are at least 0; got {int(tokens.min())}.")
        if lengths is None:
            return
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(f"`lengths` has one number for each of {len(tokens)} rows; got {tuple(lengths.shape)}.")
        if lengths.numel() and not (int(lengths.min()) >= 1 and int(lengths.max()) <= tokens.shape[1]):
            raise ValueError(f"Lengths of rows of {tokens.shape[1]} tokens lie in 1 to that; got {lengths.tolist()}.")
