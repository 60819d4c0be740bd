"""Which rows a full replay buffer keeps: each policy is one class and one entry of ``BUILT_IN``."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_replay.utilities.validation import described, is_integer

__all__ = ["BUILT_IN", "FIFO", "Policy", "Reservoir", "place", "policy_of", "saved_policy"]


class Policy(ABC):
    """Chooses the slots of new rows once a replay buffer is full.

    A buffer first fills up in order of arrival: row ``t``, counted from 0, goes to slot ``t``. From then on the policy
    chooses a slot for each new row. The row overwrites the one in that slot, or is dropped.

    A policy keeps no state of its own. Its result depends only on the arguments of ``slots`` and on settings that
    never change, so that an interrupted addition can be repeated and a restored buffer continues exactly. Saved buffers
    store ``name`` and nothing else of the policy: load them with ``ReplayBuffer.load(path, policy=...)`` or
    ``ReplayBuffer.from_state_dict(state, policy=...)`` and a policy with the same settings.

    Example:
        >>> from lightning_replay import ReplayBuffer
        >>> class KeepFirst(Policy):
        ...     name = "keep-first"
        ...
        ...     def slots(self, seen, arriving, capacity, generator):
        ...         return torch.full((arriving,), capacity)  # drop every row
        >>> buffer = ReplayBuffer(capacity=2, length=3, policy=KeepFirst())
        >>> buffer.add(torch.tensor([[1, 1, 1], [2, 2, 2], [3, 3, 3]]))
        >>> sorted(buffer.draw(2).tokens[:, 0].tolist())
        [1, 2]
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the policy in saved states. A class attribute ``name = "..."`` is enough."""

    @abstractmethod
    def slots(self, seen: int, arriving: int, capacity: int, generator: torch.Generator) -> Tensor:
        """Choose a slot for each new row.

        If several rows get the same slot, the buffer keeps the last of them.

        Args:
            seen: Number of rows added before these, dropped and overwritten ones included.
            arriving: Number of new rows. The first of them is row ``seen``, counted from 0.
            capacity: Number of slots.
            generator: The only source of randomness to use. Its state is saved with the buffer.

        Returns:
            Slots, shape ``(arriving,)``, any integer type, on the CPU. A slot of ``capacity`` or more drops the row.
            The buffer ignores the entries of rows that arrive before it is full.
        """


class FIFO(Policy):
    """The oldest row gives way to the new one: first in, first out."""

    name = "fifo"

    def slots(self, seen: int, arriving: int, capacity: int, generator: torch.Generator) -> Tensor:
        """Take the slots in turn."""
        return (seen + torch.arange(arriving)) % capacity


class Reservoir(Policy):
    """At any time the buffer is a uniform sample of all rows ever added (Vitter 1985, algorithm R)."""

    name = "reservoir"

    def slots(self, seen: int, arriving: int, capacity: int, generator: torch.Generator) -> Tensor:
        """Choose uniformly among ``t + 1`` slots for row ``t``: it is kept with probability ``capacity / (t + 1)``."""
        choices = seen + torch.arange(arriving) + 1
        return (torch.rand(arriving, generator=generator, dtype=torch.float64) * choices).long()


BUILT_IN: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        FIFO(),
        Reservoir(),
    )
}
"""The policies that a string selects."""

_NAMES = ", ".join(map(repr, BUILT_IN))


def policy_of(given: str | Policy) -> Policy:
    """The policy that a user chose by name or passed as an object.

    Raises:
        ValueError: If the name is unknown, or a policy of the user's own has the name of a built-in one.
    """
    if not isinstance(given, Policy):
        if not isinstance(given, str) or given not in BUILT_IN:
            raise ValueError(f"`policy` is one of {_NAMES} or a Policy object; got {given!r}.")
        return BUILT_IN[given]
    if given.name in BUILT_IN and type(given) is not type(BUILT_IN[given.name]):
        raise ValueError(
            f"The policy {type(given).__name__} has the name of a built-in policy, {given.name!r}. Saved buffers store "
            f"this name: set `{type(given).__name__}.name` to one that is none of {_NAMES}."
        )
    return given


def saved_policy(name: str, given: Policy | None) -> Policy:
    """The policy of a saved buffer: the given one, or the built-in one of this name.

    Raises:
        ValueError: If no policy is given and none of the built-in ones has this name.
    """
    if given is not None:
        return policy_of(given)
    if name not in BUILT_IN:
        raise ValueError(
            f"The saved replay buffer's `policy` is {name!r}, which is none of the built-in ones ({_NAMES}). If the "
            "policy is your own, pass the object: `ReplayBuffer.load(path, policy=...)` or "
            "`ReplayBuffer.from_state_dict(state, policy=...)`."
        )
    return BUILT_IN[name]


def place(policy: Policy, seen: int, arriving: int, capacity: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Decide which new rows are stored, and in which slots.

    Args:
        policy: Chooses the slots of rows that arrive when the buffer is full.
        seen: Number of rows added before.
        arriving: Number of new rows.
        capacity: Number of slots.
        generator: Source of the policy's randomness.

    Returns:
        Slots in ascending order, each once, and the indices of the new rows that go there; both ``int64``.

    Raises:
        ValueError: If the policy returns anything but an integer slot of at least 0 for each new row.
    """
    chosen = policy.slots(seen, arriving, capacity, generator)
    if not isinstance(chosen, Tensor) or chosen.shape != (arriving,) or not is_integer(chosen):
        raise ValueError(
            f"`{type(policy).__name__}.slots` returns an integer tensor of shape ({arriving},), a slot for each new "
            f"row; got {described(chosen)}."
        )
    arrivals = seen + torch.arange(arriving)
    slots = torch.where(arrivals < capacity, arrivals, chosen.long())
    if arriving and int(slots.min()) < 0:
        raise ValueError(
            f"`{type(policy).__name__}.slots` returns slots of at least 0; got {int(slots.min())}. Return {capacity}, "
            "the capacity, for a row to drop."
        )
    last = torch.full((capacity,), -1)
    inside = slots < capacity
    last.scatter_reduce_(0, slots[inside], torch.arange(arriving)[inside], "amax")
    taken = (last >= 0).nonzero().squeeze(1)
    return taken, last[taken]
