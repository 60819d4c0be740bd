"""A small forward that compares models and leaves no trace."""

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_replay.models.language_model import LanguageModel, evaluating

__all__ = ["probe_logits", "probe_tokens"]


def probe_tokens(model: LanguageModel, length: int) -> Tensor:
    """One row of different tokens, shape ``(1, length)``, or less if the vocabulary or the context is smaller."""
    length = min(length, model.vocabulary, model.context or length)
    return torch.arange(length, dtype=torch.int64, device=model.device).unsqueeze(0)


def probe_logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """The logits of some tokens in evaluation mode, shape ``(rows, length, vocabulary)``.

    The call is not compiled for the shape of the probe, and the global random state stays as it is. Two calls thus
    begin with the same random state.
    """
    with isolate_rng(), evaluating(model.module), torch.compiler.set_stance("force_eager"):
        return model.logits(tokens)
