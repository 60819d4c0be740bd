import pytest
import torch
from scipy.stats import chisquare

from lightning_replay import ReplayBuffer


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
    buffer = ReplayBuffer(6, 4, policy=policy, seed=3)  # type: ignore[arg-type]
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
