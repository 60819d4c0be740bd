"""Filters of samples: callables that select which samples to keep. None is applied by default.

A filter is called with ``lightning_replay.sampling.Samples`` and returns a boolean tensor of shape ``(samples,)``,
True for each sample to keep. Any function with that signature is a filter. The number of samples that each has dropped
is logged as ``replay/dropped/<name>``.

Note:
    With next-token loss, poor samples can be worse than none (arXiv 2605.29495). The KL divergence tolerates them, and
    every filter moves the samples away from the model's own distribution.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from lightning_replay.sampling.samples import Filter, Samples
from lightning_replay.sampling.statistics import ngrams, repetition

__all__ = ["Duplicates", "Filter", "Length", "NgramOverlap", "Perplexity", "Repetition"]


@dataclass(frozen=True)
class Duplicates:
    """Keeps the first of equal samples of a refill.

    Example:
        >>> samples = Samples(torch.tensor([[1, 2], [1, 2], [1, 3]]), torch.tensor([2, 2, 2]), torch.ones(3, 2).bool())
        >>> Duplicates()(samples)
        tensor([ True, False,  True])
    """

    def __call__(self, samples: Samples) -> Tensor:
        """Return True for samples that equal no earlier one, shape ``(samples,)``."""
        rows = torch.cat([samples.tokens, samples.lengths.unsqueeze(1)], 1)
        _, kind = torch.unique(rows, dim=0, return_inverse=True)
        return _first_of(kind) == torch.arange(len(rows), dtype=torch.int64, device=rows.device)


@dataclass(frozen=True)
class NgramOverlap:
    """Drops samples that share too many n-grams with earlier samples of the same refill.

    Args:
        n: Tokens in an n-gram.
        most: The largest share of a sample's n-grams that may occur in earlier samples, dropped ones included.
    """

    n: int = 8
    most: float = 0.5

    def __call__(self, samples: Samples) -> Tensor:
        """Return True for samples with few enough n-grams of earlier ones, shape ``(samples,)``."""
        hashes, real = ngrams(samples.tokens, samples.lengths, self.n)
        sample = torch.arange(len(hashes), dtype=torch.int64, device=hashes.device).unsqueeze(1).expand_as(hashes)
        seen_before = torch.zeros_like(real)
        _, kind = torch.unique(hashes[real], return_inverse=True)
        first = hashes.new_full((int(kind.max()) + 1 if len(kind) else 0,), len(hashes))
        first.scatter_reduce_(0, kind, sample[real], "amin")
        seen_before[real] = first[kind] < sample[real]
        return seen_before.sum(1) <= self.most * real.sum(1)


@dataclass(frozen=True)
class Length:
    """Keeps samples whose number of tokens, the prompt included, lies in a range.

    Args:
        least: The smallest number of tokens.
        most: The largest number; unlimited by default.
    """

    least: int = 1
    most: float = inf

    def __call__(self, samples: Samples) -> Tensor:
        """Return True for samples whose length is in the range, shape ``(samples,)``."""
        return (samples.lengths >= self.least) & (samples.lengths <= self.most)


@dataclass(frozen=True)
class Repetition:
    """Drops samples that repeat their own n-grams.

    Args:
        n: Tokens in an n-gram.
        most: The largest share of a sample's n-grams that may occur earlier in the same sample.
    """

    n: int = 4
    most: float = 0.5

    def __call__(self, samples: Samples) -> Tensor:
        """Return True for samples with few enough repeated n-grams, shape ``(samples,)``."""
        return repetition(samples.tokens, samples.lengths, self.n) <= self.most


@dataclass(frozen=True)
class Perplexity:
    """Keeps samples whose perplexity under the model that generated them lies in a range.

    With ``source="reference"`` that model is π. The perplexity is over the drawn tokens, at temperature 1 and without
    truncation.

    Args:
        least: The lowest perplexity.
        most: The highest; unlimited by default.

    Raises:
        ValueError: When called with samples without log-probabilities, as a custom sampler may return them.
    """

    least: float = 1.0
    most: float = inf

    def __call__(self, samples: Samples) -> Tensor:
        """Return True for samples whose perplexity is in the range, shape ``(samples,)``."""
        if samples.log_probs is None:
            raise ValueError(
                "The perplexity filter needs the log-probabilities of the drawn tokens, and the samples have none. "
                "Return `lightning_replay.sampling.Samples` with `log_probs` from the sampler, or leave out the filter."
            )
        surprise = -samples.log_probs.double().sum(1) / samples.drawn.sum(1).clamp(min=1)
        return (surprise.exp() >= self.least) & (surprise.exp() <= self.most)


def _first_of(kinds: Tensor) -> Tensor:
    """For each element, the index of the first one equal to it."""
    places = torch.arange(len(kinds), dtype=torch.int64, device=kinds.device)
    first = torch.full_like(places, len(kinds)).scatter_reduce_(0, kinds, places, "amin")
    return first[kinds]
