"""Filters of samples: small callables that say which to keep. All are off unless they are asked for.

A filter is called with ``lightning_replay.sampling.Samples`` and returns a boolean tensor of shape
``(samples,)``, True where a sample is kept. Any function with that signature is one. How many samples each has dropped
is logged as ``replay/dropped/<name>``.

Note:
    Poor samples can be worse than none with next-token loss (arXiv 2605.29495); the KL forgives them, and every filter
    moves the samples away from the model's own distribution.
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
    """Keeps the first of several equal samples of a refill.

    Example:
        >>> samples = Samples(torch.tensor([[1, 2], [1, 2], [1, 3]]), torch.tensor([2, 2, 2]), torch.ones(3, 2).bool())
        >>> Duplicates()(samples)
        tensor([ True, False,  True])
    """

    def __call__(self, samples: Samples) -> Tensor:
        """Which samples are the first of their kind."""
        rows = torch.cat([samples.tokens, samples.lengths.unsqueeze(1)], 1)
        _, kind = torch.unique(rows, dim=0, return_inverse=True)
        return _first_of(kind) == torch.arange(len(rows), device=rows.device)


@dataclass(frozen=True)
class NgramOverlap:
    """Drops samples of which more than a share stands in earlier samples of the same refill.

    Args:
        n: Tokens in an n-gram.
        most: The largest share of a sample's n-grams that may stand in earlier samples, dropped ones included.
    """

    n: int = 8
    most: float = 0.5

    def __call__(self, samples: Samples) -> Tensor:
        """Which samples are new enough."""
        hashes, real = ngrams(samples.tokens, samples.lengths, self.n)
        sample = torch.arange(len(hashes), device=hashes.device).unsqueeze(1).expand_as(hashes)
        seen_before = torch.zeros_like(real)
        _, kind = torch.unique(hashes[real], return_inverse=True)
        first = torch.full((int(kind.max()) + 1 if len(kind) else 0,), len(hashes), device=hashes.device)
        first.scatter_reduce_(0, kind, sample[real], "amin")
        seen_before[real] = first[kind] < sample[real]
        return seen_before.sum(1) <= self.most * real.sum(1)


@dataclass(frozen=True)
class Length:
    """Keeps samples whose number of tokens, the prompt included, lies in a range.

    Args:
        least: The fewest tokens.
        most: The most; any number by default.
    """

    least: int = 1
    most: float = inf

    def __call__(self, samples: Samples) -> Tensor:
        """Which samples are neither too short nor too long."""
        return (samples.lengths >= self.least) & (samples.lengths <= self.most)


@dataclass(frozen=True)
class Repetition:
    """Drops samples that repeat themselves.

    Args:
        n: Tokens in an n-gram.
        most: The largest share of a sample's n-grams that may stand earlier in the same sample.
    """

    n: int = 4
    most: float = 0.5

    def __call__(self, samples: Samples) -> Tensor:
        """Which samples don't repeat themselves too much."""
        return repetition(samples.tokens, samples.lengths, self.n) <= self.most


@dataclass(frozen=True)
class Perplexity:
    """Keeps samples whose own perplexity, under the model that wrote them, lies in a range.

    With ``source="reference"`` that model is π. Over the drawn tokens, at temperature 1 and with nothing truncated.

    Args:
        least: The lowest perplexity.
        most: The highest; any by default.

    Raises:
        ValueError: When called with samples whose log-probabilities a sampler of the user's own didn't tell.
    """

    least: float = 1.0
    most: float = inf

    def __call__(self, samples: Samples) -> Tensor:
        """Which samples are neither too likely nor too unlikely."""
        if samples.log_probs is None:
            raise ValueError(
                "The perplexity filter needs the log-probabilities of the tokens drawn: let your `sampler` return "
                "`lightning_replay.sampling.Samples` with `log_probs`."
            )
        surprise = -samples.log_probs.double().sum(1) / samples.drawn.sum(1).clamp(min=1)
        return (surprise.exp() >= self.least) & (surprise.exp() <= self.most)


def _first_of(kinds: Tensor) -> Tensor:
    """For each element, the place of the first one equal to it."""
    places = torch.arange(len(kinds), device=kinds.device)
    first = torch.full_like(places, len(kinds)).scatter_reduce_(0, kinds, places, "amin")
    return first[kinds]
