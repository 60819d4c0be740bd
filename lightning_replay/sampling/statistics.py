"""Statistics of sampled tokens that need no model: distinct n-grams and repetition."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distinct_n", "ngrams", "repetition"]


def ngrams(tokens: Tensor, lengths: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A 64-bit hash of each n-gram, and a mask of those without padding.

    Args:
        tokens: Token ids, shape ``(rows, length)``.
        lengths: Real tokens in each row, shape ``(rows,)``.
        n: Tokens in an n-gram.

    Returns:
        Hashes and a mask, both of shape ``(rows, max(length - n + 1, 0))``.
    """
    windows = max(tokens.shape[1] - n + 1, 0)
    hashes = torch.zeros(len(tokens), windows, dtype=torch.int64, device=tokens.device)
    for place in range(n):
        hashes = (hashes + tokens[:, place : place + windows] + 1) * 6364136223846793005
        hashes ^= hashes >> 29
    real = torch.arange(windows, dtype=torch.int64, device=tokens.device) + n <= lengths.unsqueeze(1)
    return hashes, real


def distinct_n(tokens: Tensor, lengths: Tensor, n: int) -> float:
    """Distinct n-grams as a share of all n-grams in the rows (distinct-n; Li et al. 2016, arXiv 1510.03055).

    Args:
        tokens: Token ids, shape ``(rows, length)``.
        lengths: Real tokens in each row, shape ``(rows,)``.
        n: Tokens in an n-gram.

    Returns:
        From near 0, if all n-grams are equal, to 1; 1 if there is no n-gram.

    Example:
        >>> distinct_n(torch.tensor([[1, 2, 1], [1, 2, 0]]), torch.tensor([3, 2]), n=2)  # 12, 21 and 12
        0.6666666666666666
    """
    hashes, real = ngrams(tokens, lengths, n)
    found = hashes[real]
    return len(torch.unique(found)) / len(found) if len(found) else 1.0


def repetition(tokens: Tensor, lengths: Tensor, n: int = 4) -> Tensor:
    """Share of a row's n-grams that occur earlier in the same row (seq-rep-n; Welleck et al. 2020, arXiv 1908.04319).

    Args:
        tokens: Token ids, shape ``(rows, length)``.
        lengths: Real tokens in each row, shape ``(rows,)``.
        n: Tokens in an n-gram.

    Returns:
        Shape ``(rows,)``, from 0 to below 1; 0 for rows without an n-gram.

    Example:
        >>> repetition(torch.tensor([[5, 6, 5, 6, 5], [1, 2, 3, 4, 5]]), torch.tensor([5, 5]), n=2)
        tensor([0.5000, 0.0000])
    """
    hashes, real = ngrams(tokens, lengths, n)
    # Sorted by hash with padding last, equal n-grams are adjacent.
    order = hashes.argsort(dim=1, stable=True)
    order = order.gather(1, (~real).gather(1, order).long().argsort(dim=1, stable=True))
    hashes, real = hashes.gather(1, order), real.gather(1, order)
    repeated = (hashes[:, 1:] == hashes[:, :-1]) & real[:, 1:]
    # In 32 bits, also when torch's default type is a 16-bit one.
    return F.pad(repeated, (1, 0)).sum(1).float() / real.sum(1).clamp(min=1)
