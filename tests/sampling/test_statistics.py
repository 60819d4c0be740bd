import pytest
import torch

from lightning_replay.demo.toy_tasks import problems
from lightning_replay.sampling.statistics import distinct_n, repetition


def by_hand(rows: list[list[int]], n: int) -> list[list[tuple[int, ...]]]:
    return [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]


def test_measures_equal_counts_by_hand() -> None:
    tokens = torch.randint(4, (50, 20))
    lengths = torch.randint(1, 21, (50,))
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    for n in (1, 2, 4):
        grams = by_hand(rows, n)
        flat = [gram for row in grams for gram in row]
        assert distinct_n(tokens, lengths, n) == len(set(flat)) / len(flat)
        expected = torch.tensor([1 - len(set(row)) / len(row) if row else 0.0 for row in grams])
        torch.testing.assert_close(repetition(tokens, lengths, n), expected)


def test_repetition_is_in_32_bits_whatever_the_default_type() -> None:
    tokens, lengths = torch.tensor([[1, 2, 1, 2]]), torch.tensor([4])
    torch.set_default_dtype(torch.bfloat16)
    try:
        value = repetition(tokens, lengths, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(1 / 3, rel=1e-6)


def test_hashes_tell_many_n_grams_apart() -> None:
    rows = problems("reverse", 20_000, torch.Generator().manual_seed(0))
    lengths = torch.full((20_000,), rows.shape[1])
    flat = {gram for row in by_hand(rows.tolist(), 5) for gram in row}
    assert distinct_n(rows, lengths, 5) == len(flat) / (20_000 * (rows.shape[1] - 4))


def test_rows_too_short_for_an_n_gram_repeat_nothing() -> None:
    tokens = torch.ones(2, 3, dtype=torch.int64)
    assert repetition(tokens, torch.tensor([3, 3]), 4).tolist() == [0, 0]
    assert distinct_n(tokens, torch.tensor([3, 3]), 4) == 1
