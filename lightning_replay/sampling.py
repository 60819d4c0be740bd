"""Sampling rows from a language model's own distribution: temperature 1, nothing truncated, always the full length."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_replay.language_model import LanguageModel

__all__ = ["Sampler", "sample_rows", "start_token"]

Sampler = Callable[[LanguageModel, Tensor, int, torch.Generator], Tensor]
"""Called with the model (in evaluation mode, without gradients), prompts of shape ``(rows, prompt length)``, the
length of a sample and a CPU generator; returns the samples, prompts included, shape ``(rows, length)``."""


def sample_rows(
    model: LanguageModel,
    prompts: Tensor,
    length: int,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """Continue prompts with tokens drawn from exactly the model's distribution.

    The end token does not stop a row (as in arXiv 2605.26097). All random numbers are drawn first, on the CPU, so a
    row depends on the generator's state and its place alone, whatever the device. A model that keeps keys and values
    is called on one token at a time; any other on the whole prefix, which costs ``length`` / 2 times as much.

    Args:
        model: The model to sample, in evaluation mode.
        prompts: Token ids that the rows begin with, shape ``(rows, prompt length)``, at least one token each.
        length: Tokens in a row, the prompt included.
        generator: The source of randomness, on the CPU. The global random state is not touched.
        temperature: Divides the logits; 1 leaves the distribution as it is.
        progress: Called with the number of rows after each token that was drawn for them.

    Returns:
        Token ids, shape ``(rows, length)``, on the model's device.

    Raises:
        ValueError: If the prompts are empty or longer than ``length``, or ``temperature`` is not above 0.
        FloatingPointError: If the model gives NaN or infinite logits.
    """
    rows, prompt_length = prompts.shape
    if not 1 <= prompt_length <= length:
        raise ValueError(f"Prompts have 1 to {length} tokens in rows of {length}; got {prompt_length}.")
    if temperature <= 0:
        raise ValueError(f"`temperature` is above 0; got {temperature}.")
    device = model.device
    precision = torch.float32 if device.type == "mps" else torch.float64
    uniforms = torch.rand(length - prompt_length, rows, 1, generator=generator, dtype=torch.float64)
    uniforms = uniforms.to(device, precision)
    tokens = torch.empty(rows, length, dtype=torch.int64, device=device)
    tokens[:, :prompt_length] = prompts.to(device)
    sane = torch.ones((), dtype=torch.bool, device=device)
    cache: Any = None
    for position in range(prompt_length, length):
        if model.has_cache:
            unread = tokens[:, :position] if cache is None else tokens[:, position - 1 : position]
            output = model.module(unread, past_key_values=cache, use_cache=True)
            logits, cache = output.logits[:, -1], output.past_key_values
        else:
            logits = model.logits(tokens[:, :position])[:, -1]
        # Inverse transform sampling: the first token whose cumulative probability exceeds a uniform number. It draws
        # from the same distribution as `torch.multinomial`, without a random number for each token of the vocabulary.
        cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=precision)
        total = cumulative[:, -1:]
        sane &= total.isfinite().all()
        drawn = torch.searchsorted(cumulative, uniforms[position - prompt_length] * total, right=True)
        tokens[:, position : position + 1] = drawn.clamp_(max=model.vocabulary - 1)
        if progress is not None:
            progress(rows)
    if not sane:
        raise FloatingPointError("The model gave NaN or infinite logits while replay rows were sampled from it.")
    return tokens


def start_token(model: LanguageModel, tokenizer: Any = None) -> int | None:
    """The token that a row begins with: beginning of sequence, else end of text (as GPT-2 does), else None."""
    sources = (tokenizer, getattr(model.module, "config", None))
    for name in ("bos_token_id", "eos_token_id"):
        for source in sources:
            token = getattr(source, name, None)
            if isinstance(token, (list, tuple)):
                token = token[0] if token else None
            if token is not None:
                return int(token)
    return None
