import math

import pytest
import torch

from lightning_replay.filters import Duplicates, Length, NgramOverlap, Perplexity, Repetition
from lightning_replay.sampling.samples import Samples
from lightning_replay.utilities.logging import filter_name


def samples(*rows: list[int], log_probs: torch.Tensor | None = None) -> Samples:
    length = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    drawn = torch.arange(length) < lengths.unsqueeze(1)
    drawn[:, 0] = False
    return Samples(tokens, lengths, drawn, log_probs)


def test_duplicates_keep_the_first_and_tell_lengths_apart() -> None:
    kept = Duplicates()(samples([1, 5, 6], [1, 5], [1, 5, 6], [1, 5, 0], [1, 5]))
    assert kept.tolist() == [True, True, False, True, False]


def test_overlap_counts_n_grams_of_earlier_samples() -> None:
    rows = ([1, 2, 3, 4, 5], [9, 2, 3, 4, 8], [1, 2, 3, 4, 5], [6, 7, 6, 7, 6])
    # 2-grams that stand in an earlier row: none; 23 and 34 of 4; all; none, though its own repeat.
    assert NgramOverlap(n=2, most=0.5)(samples(*rows)).tolist() == [True, True, False, True]
    assert NgramOverlap(n=2, most=0.49)(samples(*rows)).tolist() == [True, False, False, True]
    assert NgramOverlap(n=9)(samples(*rows)).all()


def test_length_and_repetition_keep_what_lies_in_their_range() -> None:
    rows = samples([1, 2], [1, 2, 3, 4], [5, 5, 5, 5])
    assert Length(3)(rows).tolist() == [False, True, True]
    assert Length(most=2)(rows).tolist() == [True, False, False]
    assert Repetition(n=1, most=0.5)(rows).tolist() == [True, True, False]


def test_perplexity_is_that_of_the_tokens_drawn() -> None:
    log_probs = torch.tensor([[0.0, math.log(0.5), math.log(0.125)], [0.0, math.log(0.5), 0.0]])
    rows = samples([1, 5, 6], [1, 5], log_probs=log_probs)  # perplexities 4 and 2
    assert Perplexity(most=3)(rows).tolist() == [False, True]
    assert Perplexity(least=3)(rows).tolist() == [True, False]
    with pytest.raises(ValueError, match="needs the log-probabilities"):
        Perplexity()(samples([1, 2]))


def test_names_are_words_in_lower_case() -> None:
    def from_a_judge(rows: Samples) -> torch.Tensor:
        return rows.lengths > 0

    assert [filter_name(f) for f in (NgramOverlap(), Duplicates(), from_a_judge)] == [
        "ngram_overlap",
        "duplicates",
        "from_a_judge",
    ]
