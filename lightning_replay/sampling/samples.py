"""Samples of a language model, and what may draw them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_replay.models.language_model import LanguageModel

__all__ = ["Filter", "Sampler", "Samples", "checked_samples"]


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


def checked_samples(given: Any, prompts: Sequence[Sequence[int]], length: int, needs_replies: bool) -> Samples:
    """What a user's own sampler returned, as samples. If that is only tokens, all after the prompts count as drawn.

    Args:
        given: What it returned.
        prompts: A prompt for each sample.
        length: Of the samples.
        needs_replies: Whether it has to say where replies begin.

    Raises:
        TypeError: If a part has another shape than it should have.
        ValueError: If a length is not one of a sample.
        MisconfigurationException: If replies are needed and not known.
    """
    tokens = given.tokens if isinstance(given, Samples) else given
    if not isinstance(tokens, Tensor) or tokens.shape != (len(prompts), length) or tokens.is_floating_point():
        what = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
        raise TypeError(
            f"`sampler` returned {what}; for {len(prompts)} samples of {length} tokens it returns token ids of shape "
            f"({len(prompts)}, {length})."
        )
    if isinstance(given, Samples):
        shapes = {"lengths": tokens.shape[:1], "drawn": tokens.shape}
        optional = {"log_probs": tokens.shape, "replies": tokens.shape[:1]}
        shapes |= {name: shape for name, shape in optional.items() if getattr(given, name) is not None}
        for name, shape in shapes.items():
            part = getattr(given, name)
            if not isinstance(part, Tensor) or part.shape != shape:
                raise TypeError(f"`sampler` returned Samples whose `{name}` do not have the shape {tuple(shape)}.")
        if not 1 <= int(given.lengths.min()) <= int(given.lengths.max()) <= length:
            raise ValueError(f"`sampler` returned Samples whose `lengths` are not 1 to {length}: {given.lengths}.")
        samples = given
    else:
        starts = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
        drawn = torch.arange(length, device=tokens.device) >= starts.unsqueeze(1)
        samples = Samples(tokens, torch.full((len(prompts),), length), drawn)
    if needs_replies and samples.replies is None:
        raise MisconfigurationException(
            "`targets='answer'` takes the loss on answers, but the Samples that `sampler` returned have no `replies` "
            "to tell where they begin. Return them, or use `targets='all'`."
        )
    return samples
