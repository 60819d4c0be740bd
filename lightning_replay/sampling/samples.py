"""Samples of a language model, and what may draw them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_replay.models.language_model import LanguageModel

__all__ = ["Filter", "Sampler", "Samples"]


class Samples(NamedTuple):
    """Samples of a language model, padded on the right.

    Attributes:
        tokens: Token ids, prompts included, shape ``(samples, length)``; 0 past a sample's end.
        lengths: Real tokens in each, shape ``(samples,)``.
        drawn: True on tokens that the model drew, False on what it was given and on padding; the tokens' shape.
        log_probs: Log-probability of each drawn token under the model as it is (temperature 1, nothing
            truncated), in nats, 0 elsewhere; the tokens' shape. None if the sampler does not provide it.
        replies: The position at which each sample's reply begins, shape ``(samples,)``; ``length`` if it never does.
            None without a reply.
    """

    tokens: Tensor
    lengths: Tensor
    drawn: Tensor
    log_probs: Tensor | None = None
    replies: Tensor | None = None

    def take(self, samples: Tensor) -> "Samples":
        """Some of them, by number or by a mask of shape ``(samples,)``."""
        return Samples(*(part if part is None else part[samples] for part in self))  # type: ignore[arg-type]


# Their types omit what they return: jsonargparse takes a function that returns a tensor for a class of tensors.
Sampler = Callable[[LanguageModel, Sequence[Sequence[int]], int, torch.Generator], Any]
"""Called with the model (in evaluation mode, without gradients), a prompt for each sample, the length of a sample and
a CPU generator. Returns the samples, prompts included: token ids of shape ``(samples, length)``, or ``Samples`` if they
are shorter or their log-probabilities are known."""

Filter = Callable[[Samples], Any]
"""Called with samples. Returns a boolean tensor of shape ``(samples,)``, True on those to keep."""
