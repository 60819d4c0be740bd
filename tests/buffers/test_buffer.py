import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from lightning_replay import ReplayBuffer, ReplayRows
from tests.buffers.test_files import same


def numbered(rows: int, length: int = 4, start: int = 0) -> torch.Tensor:
    """Rows that all hold their own number."""
    return torch.arange(start, start + rows).unsqueeze(1).expand(-1, length)


def drawn(buffer: ReplayBuffer, rows: int) -> list[int]:
    return buffer.draw(rows).tokens[:, 0].tolist()


def test_a_pass_draws_every_row_once() -> None:
    buffer = ReplayBuffer(10, 4)
    buffer.add(numbered(10))
    assert sorted(drawn(buffer, 3) + drawn(buffer, 3) + drawn(buffer, 4)) == list(range(10))
    assert buffer.unused == 0


def test_drawing_past_the_pass_begins_the_next() -> None:
    buffer = ReplayBuffer(4, 4)
    buffer.add(numbered(4))
    first = drawn(buffer, 6)
    assert sorted(first[:4]) == [0, 1, 2, 3]
    assert sorted(first[4:] + drawn(buffer, 2)) == [0, 1, 2, 3]


def test_fifo_keeps_the_newest_rows() -> None:
    buffer = ReplayBuffer(4, 4)
    buffer.add(numbered(3))
    buffer.add(numbered(3, start=3))
    assert len(buffer) == 4
    assert sorted(drawn(buffer, 4)) == [2, 3, 4, 5]
    buffer.add(numbered(9, start=6))
    assert sorted(drawn(buffer, 4)) == [11, 12, 13, 14]


def test_a_row_that_overwrites_an_undrawn_one_takes_its_turn() -> None:
    buffer = ReplayBuffer(4, 4)
    buffer.add(numbered(4))
    before = drawn(buffer, 1)
    buffer.add(numbered(2, start=4))  # overwrites 0 and 1, drawn or not
    remaining = drawn(buffer, buffer.unused)
    assert sorted(remaining) == sorted({2, 3, 4, 5} - set(before))


def test_reservoir_keeps_every_row_with_the_same_probability() -> None:
    counts = torch.zeros(40)
    for seed in range(600):
        buffer = ReplayBuffer(10, 2, policy="reservoir", seed=seed)
        for start in range(0, 40, 8):
            buffer.add(numbered(8, 2, start))
        counts[drawn(buffer, 10)] += 1
    assert counts.sum() == 6000
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_short_rows_are_padded_and_masked() -> None:
    buffer = ReplayBuffer(2, 4)
    buffer.add(torch.tensor([[7, 8]]), torch.tensor([1]))
    rows = buffer.draw(1)
    assert rows.tokens.shape == (1, 4)
    assert rows.mask.tolist() == [[True, False, False, False]]
    assert rows.targets_mask.tolist() == [[False, False, False]]


def test_drawing_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    buffer = ReplayBuffer(8, 4, policy="reservoir")
    buffer.add(numbered(20))
    buffer.draw(5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("policy", ["fifo", "reservoir"])
def test_a_restored_buffer_goes_on_as_the_saved_one(policy: str, tmp_path: object) -> None:
    buffer = ReplayBuffer(6, 4, policy=policy, seed=3)
    buffer.add(numbered(9))
    buffer.draw(4)
    torch.save(buffer.state_dict(), f"{tmp_path}/buffer.pt")
    twin = ReplayBuffer.from_state_dict(torch.load(f"{tmp_path}/buffer.pt", weights_only=True))
    for step in range(3):
        assert drawn(buffer, 5) == drawn(twin, 5)
        buffer.add(numbered(4, start=10 * step))
        twin.add(numbered(4, start=10 * step))
    assert buffer.unused == twin.unused


def test_state_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="make it like the saved one"):
        ReplayBuffer(5, 4).load_state_dict(ReplayBuffer(6, 4).state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0, "length": 4}, "`capacity`"),
        ({"capacity": 4, "length": 1}, "`length`"),
        ({"capacity": 4, "length": 4, "policy": "lifo"}, "'fifo', 'reservoir'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayBuffer(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), None),
        (torch.zeros(2, 4), None),
        (torch.zeros(4, dtype=torch.int64), None),
        (torch.tensor([[-1, 2]]), None),
        (torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4])),
        (torch.zeros(2, 4, dtype=torch.int64), torch.tensor([0, 4])),
        (torch.zeros(2, 4, dtype=torch.int64), torch.tensor([5, 4])),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_stored(
    tokens: torch.Tensor, lengths: torch.Tensor | None
) -> None:
    buffer = ReplayBuffer(4, 4)
    with pytest.raises(ValueError, match="got"):
        buffer.add(tokens, lengths)
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="empty"):
        buffer.draw(1)


def test_rows_come_back_with_their_targets_in_four_bytes_a_token() -> None:
    buffer = ReplayBuffer(8, 6)
    tokens = torch.randint(0, 2**31 - 1, (5, 6))
    tokens[0, 0] = 0
    lengths, targets = torch.tensor([6, 5, 4, 3, 2]), torch.rand(5, 6) > 0.5
    buffer.add(ReplayRows(tokens, lengths, targets), step=7)
    drawn = buffer.draw(5)
    order = [int((tokens[:, 1] == row[1]).nonzero()) for row in drawn.tokens]
    mask = ReplayRows(tokens, lengths).mask
    assert torch.equal(drawn.tokens, (tokens * mask)[order])
    assert torch.equal(drawn.lengths, lengths[order])
    assert torch.equal(drawn.targets_mask, (targets & mask)[order][:, 1:])
    assert drawn.steps is not None
    assert drawn.steps.tolist() == [7] * 5
    tensors = [value for value in buffer.state_dict().values() if isinstance(value, torch.Tensor) and value.dim() == 2]
    assert sum(value.nbytes for value in tensors) == 5 * 6 * 4


def test_cached_log_probabilities_take_six_bytes_each_and_one_more_for_the_tail() -> None:
    buffer = ReplayBuffer(3, 5, top_k=4)
    ids, log_probs = torch.randint(100, (2, 4, 4)), torch.randn(2, 4, 5).half()
    buffer.add(ReplayRows(numbered(2, 5), torch.tensor([5, 5]), None, ids, log_probs))
    drawn = buffer.draw(2)
    order = drawn.tokens[:, 0]
    assert drawn.top_ids is not None
    assert drawn.top_log_probs is not None
    assert torch.equal(drawn.top_ids, ids[order])
    assert torch.equal(drawn.top_log_probs, log_probs[order])
    state = buffer.state_dict()
    assert state["top_ids"].nbytes + state["top_log_probs"].nbytes == 2 * 4 * (4 * 6 + 2)
    with pytest.raises(ValueError, match="stores 4 log-probabilities per position; the rows have 0"):
        buffer.add(numbered(1, 5))


def test_rows_count_their_uses_and_tell_how_many_are_left() -> None:
    buffer = ReplayBuffer(4, 4)
    buffer.add(numbered(4))
    assert [buffer.left(uses) for uses in (1, 2, 3)] == [4, 8, 12]
    buffer.draw(3)
    assert [buffer.left(uses) for uses in (1, 2, 3)] == [1, 5, 9]
    rows = buffer.draw(3)
    assert rows.uses is not None
    assert sorted(rows.uses.tolist()) == [1, 2, 2]
    assert [buffer.left(uses) for uses in (1, 2, 3)] == [0, 2, 6]
    buffer.add(numbered(4, start=10))
    assert buffer.left(1) == 4
    fresh = buffer.draw(4).uses
    assert fresh is not None
    assert fresh.tolist() == [1, 1, 1, 1]


def test_a_state_without_rows_goes_on_in_a_buffer_of_the_same_rows() -> None:
    one, other = ReplayBuffer(9, 4), ReplayBuffer(9, 4)
    for buffer in (one, other):
        buffer.add(numbered(9))
    one.draw(5)
    state = one.state_dict(rows=False)
    assert "tokens" not in state
    other.load_state_dict(state)
    assert [drawn(one, 3) for _ in range(5)] == [drawn(other, 3) for _ in range(5)]
    with pytest.raises(ValueError, match="was saved without them, but this buffer holds 0 rows"):
        ReplayBuffer(9, 4).load_state_dict(state)


def test_a_state_of_the_first_format_is_read_and_a_later_one_is_refused() -> None:
    buffer = ReplayBuffer(4, 4)
    buffer.add(numbered(3), torch.tensor([4, 3, 2]))
    state = buffer.state_dict()
    first = {
        "format": 1,
        "capacity": 4,
        "length": 4,
        "policy": "fifo",
        "seen": 3,
        "tokens": numbered(3).int(),
        "lengths": torch.tensor([4, 3, 2], dtype=torch.int32),
        "deck": state["deck"],
        "generator": state["generator"],
    }
    old = ReplayBuffer.from_state_dict(first)
    ours, theirs = old.draw(3), buffer.draw(3)
    assert torch.equal(ours.tokens * ours.mask, theirs.tokens)
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.targets_mask, theirs.targets_mask)
    with pytest.raises(ValueError, match="has format 3; this version"):
        buffer.load_state_dict(state | {"format": 3})


def half_drawn(policy: str, rows: int = 8) -> ReplayBuffer:
    buffer = ReplayBuffer(6, 4, policy, seed=1)
    buffer.add(numbered(rows))
    buffer.draw(3)
    return buffer


ANOTHER = half_drawn("fifo", rows=5).state_dict() | {"passes": 4}
CALLS: dict[str, Callable[[ReplayBuffer], Any]] = {
    "add": lambda buffer: buffer.add(numbered(4, start=10), step=7),
    "draw": lambda buffer: buffer.draw(4),
    "draw more than it holds": lambda buffer: buffer.draw(15),
    "renew": lambda buffer: buffer.renew(),
    "load": lambda buffer: buffer.load_state_dict(ANOTHER | {"policy": buffer.policy.name}),
}


@contextmanager
def before_each_instruction(act: Callable[[int], None]) -> Iterator[None]:
    """Call a function with 1, 2, ... before each instruction of the package's buffers, as a signal handler may run."""
    executed = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal executed
        if Path(frame.f_code.co_filename).parent.name != "buffers":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            executed += 1
            act(executed)
        return trace

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(tracing)


@pytest.mark.parametrize("policy", ["fifo", "reservoir"])
@pytest.mark.parametrize("call", CALLS)
def test_a_state_saved_in_the_middle_of_a_call_is_the_one_before_or_after(call: str, policy: str) -> None:
    buffer, before, after = half_drawn(policy), half_drawn(policy), half_drawn(policy)
    CALLS[call](after)
    old, new, were_old = before.state_dict(), after.state_dict(), []

    def save(number: int) -> None:
        state = buffer.state_dict()
        were_old.append(same(state, old))
        assert were_old[-1] or same(state, new)
        assert buffer.max_token == (before if were_old[-1] else after).max_token

    with before_each_instruction(save):
        CALLS[call](buffer)
    assert same(buffer.state_dict(), new)
    assert were_old == sorted(were_old, reverse=True)  # one assignment turns the old state into the new one
    assert sum(were_old) > 20


class Interruption(BaseException):
    """Like Ctrl-C, but raised by this test only."""


@pytest.mark.parametrize("call", CALLS)
def test_a_call_interrupted_at_any_instruction_can_be_repeated(call: str) -> None:
    once = half_drawn("reservoir")
    CALLS[call](once)
    old, new = half_drawn("reservoir").state_dict(), once.state_dict()
    next_rows = drawn(half_drawn("reservoir"), 4)
    last = 0

    def interrupt(number: int) -> None:
        if number == last:
            raise Interruption

    was_interrupted = True
    while was_interrupted:
        last += 1
        buffer = half_drawn("reservoir")
        try:
            with before_each_instruction(interrupt):
                CALLS[call](buffer)
            was_interrupted = False
        except Interruption:
            if same(buffer.state_dict(), old):
                assert drawn(copy.deepcopy(buffer), 4) == next_rows  # another call finds the old rows
                CALLS[call](buffer)
        assert same(buffer.state_dict(), new), last
    assert last > 20
