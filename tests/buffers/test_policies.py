"""Which rows a full buffer keeps, by the built-in policies and by a user's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_replay import ReplayBuffer
from lightning_replay.buffers.policies import FIFO, Policy, Reservoir
from tests.buffers.test_buffer import drawn, numbered


class KeepEdges(Policy):
    """Keeps the first ``pinned`` rows, drops every third later row and puts the others in the other slots in turn."""

    name = "keep-edges"

    def __init__(self, pinned: int) -> None:
        self.pinned = pinned

    def slots(self, seen: int, arriving: int, capacity: int, generator: torch.Generator) -> Tensor:
        late = seen + torch.arange(arriving) - capacity  # 0 for the first row that finds the buffer full
        turns = self.pinned + late % (capacity - self.pinned)
        return torch.where(late % 3 == 2, capacity, turns)


class RandomReplacement(Policy):
    """Each new row replaces a random one."""

    name = "random-replacement"

    def slots(self, seen: int, arriving: int, capacity: int, generator: torch.Generator) -> Tensor:
        return torch.randint(capacity, (arriving,), generator=generator)


def held(buffer: ReplayBuffer) -> list[int]:
    """The number of the row in each slot."""
    numbers: list[int] = buffer.state_dict()["tokens"][:, 0].tolist()
    return numbers


@pytest.mark.parametrize("sizes", [[11], [1] * 11, [3, 5, 3]])
def test_a_policy_of_a_user_s_own_decides_what_a_full_buffer_holds(sizes: list[int]) -> None:
    buffer = ReplayBuffer(4, 4, KeepEdges(pinned=2))
    first = 0
    for rows in sizes:
        buffer.add(numbered(rows, start=first))
        first += rows
    # Rows 0 to 3 fill the slots. Then 4 -> slot 2, 5 -> slot 3, 6 dropped, 7 -> 3, 8 -> 2, 9 dropped, 10 -> 2.
    assert held(buffer) == [0, 1, 10, 7]
    assert sorted(drawn(buffer, 4)) == [0, 1, 7, 10]


def test_a_dropped_row_counts_as_seen_and_is_not_drawn() -> None:
    buffer = ReplayBuffer(4, 4, KeepEdges(pinned=2))
    buffer.add(numbered(6))
    assert sorted(drawn(buffer, 4)) == [0, 1, 4, 5]
    buffer.add(numbered(1, start=6))  # dropped: no row joins the pass
    assert (buffer.unused, buffer.state_dict()["seen"]) == (0, 7)
    buffer.add(numbered(1, start=7))
    assert drawn(buffer, 1) == [7]


@pytest.mark.parametrize("how", ["state.pt", "rows.safetensors", "rows.parquet"])
@pytest.mark.parametrize("policy", [KeepEdges(pinned=1), RandomReplacement()])
def test_a_buffer_with_a_policy_of_a_user_s_own_continues_after_loading(
    policy: Policy, how: str, tmp_path: Path
) -> None:
    buffer, path = ReplayBuffer(5, 4, policy, seed=2), tmp_path / how
    buffer.add(numbered(7))
    buffer.draw(3)

    def loaded(policy: Policy | None) -> ReplayBuffer:
        if path.suffix == ".pt":
            return ReplayBuffer.from_state_dict(torch.load(path, weights_only=True), policy)
        return ReplayBuffer.load(path, policy=policy)

    if path.suffix == ".pt":
        torch.save(buffer.state_dict(), path)
    else:
        buffer.save(path)
    twin = loaded(policy)
    for first in (7, 20, 31):
        for each in (buffer, twin):
            each.add(numbered(4, start=first))
        assert held(twin) == held(buffer)
        assert drawn(twin, 6) == drawn(buffer, 6)
    with pytest.raises(ValueError, match=rf"`policy` is '{policy.name}', which is none of the built-in ones.*pass the"):
        loaded(None)
    with pytest.raises(ValueError, match=rf"'policy': '{policy.name}'.*this one is .*'policy': 'fifo'"):
        loaded(FIFO())


def test_rows_get_cached_log_probabilities_under_a_policy_of_a_user_s_own() -> None:
    buffer = ReplayBuffer(5, 4, KeepEdges(pinned=1))
    buffer.add(numbered(5))
    shape = (5, 3, 2)
    cached = buffer.with_cache(
        lambda rows: rows._replace(top_ids=torch.ones(shape).long(), top_log_probs=torch.full((5, 3, 3), -1.0))
    )
    assert cached.policy is buffer.policy
    assert drawn(cached, 5) == drawn(buffer, 5)


@pytest.mark.parametrize(("name", "policy"), [("fifo", FIFO()), ("reservoir", Reservoir())])
def test_a_string_selects_the_policy_of_its_name(name: str, policy: Policy) -> None:
    by_name, by_object = ReplayBuffer(5, 4, name), ReplayBuffer(5, 4, policy)
    for buffer in (by_name, by_object):
        buffer.add(numbered(9))
        buffer.add(numbered(4, start=9))
    assert held(by_name) == held(by_object)
    assert by_name.state_dict()["policy"] == by_object.state_dict()["policy"] == name
    assert drawn(ReplayBuffer.from_state_dict(by_object.state_dict()), 5) == drawn(by_name, 5)


def test_algorithm_r_by_hand() -> None:
    buffer = ReplayBuffer(3, 4, "reservoir", seed=4)
    lottery = torch.rand(8, generator=torch.Generator().manual_seed(4), dtype=torch.float64).tolist()
    buffer.add(numbered(8))
    slots = [0, 1, 2]
    for row in range(3, 8):
        chosen = int(lottery[row] * (row + 1))
        if chosen < 3:
            slots[chosen] = row
    assert held(buffer) == slots


class Misnamed(FIFO):
    """Inherits the name of another policy."""


class Wrong(Policy):
    name = "wrong"

    def __init__(self, slots: Any) -> None:
        self.result = slots

    def slots(self, seen: int, arriving: int, capacity: int, generator: torch.Generator) -> Tensor:
        generator.manual_seed(99)
        result: Tensor = self.result
        return result


def test_a_policy_with_the_name_of_a_built_in_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Misnamed has the name of a built-in policy, 'fifo'.*`Misnamed.name`"):
        ReplayBuffer(4, 4, Misnamed())
    with pytest.raises(TypeError, match="abstract.*name"):
        type("Nameless", (Policy,), {"slots": FIFO.slots})()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 1], r"`Wrong.slots` returns an integer tensor of shape \(2,\).*got a list"),
        (torch.tensor([0.0, 1.0]), "got torch.float32"),
        (torch.tensor([0]), r"got torch.int64 of shape \(1,\)"),
        (torch.tensor([0, -1]), "slots of at least 0; got -1. Return 4, the capacity, for a row to drop"),
    ],
)
def test_slots_that_a_buffer_does_not_have_are_refused_and_nothing_is_stored(slots: Any, message: str) -> None:
    buffer, twin = ReplayBuffer(4, 4, Wrong(slots), seed=1), ReplayBuffer(4, 4, seed=1)
    for each in (buffer, twin):
        each.policy = FIFO()
        each.add(numbered(4))
    buffer.policy = Wrong(slots)
    with pytest.raises(ValueError, match=message):
        buffer.add(numbered(2, start=4))
    assert held(buffer) == [0, 1, 2, 3]
    assert drawn(buffer, 8) == drawn(twin, 8)
