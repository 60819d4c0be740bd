"""Log-probabilities of a reference, kept beside the rows."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.linear_losses import top_k_of_head
from lightning_replay.losses import top_k_log_probs
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import LanguageModel

__all__ = ["cache_reference"]


def cache_reference(
    model: LanguageModel,
    rows: ReplayRows,
    k: int,
    temperature: float,
    between: Callable[[], object] = lambda: None,
    batch_size: int = 64,
) -> ReplayRows:
    """The same rows with the model's likeliest next tokens and their log-probabilities.

    Each row takes one forward after decoding: rows are cut and packed after they are decoded, and the log-probabilities
    have to be those of the context that training uses.

    Args:
        model: The reference, active.
        rows: The rows.
        k: The number of tokens to keep for each position; all if the vocabulary is smaller.
        temperature: Divides the logits.
        between: Called before each batch of rows.
        batch_size: Rows in a forward.
    """
    heads, k = OutputHeads(), min(k, model.vocabulary)
    ids, log_probs = [], []
    for some in torch.arange(len(rows.tokens), dtype=torch.int64).split(batch_size):  # type: ignore[no-untyped-call]
        call = functools.partial(_logits, tokens=rows.tokens[some, :-1].to(model.device))
        found = heads.run(model, call, lambda hidden: top_k_of_head(*hidden, k, temperature))
        between()
        top_ids, top_log_probs = top_k_log_probs(call(model), k, temperature) if found is None else found
        ids.append(top_ids.cpu())
        log_probs.append(top_log_probs.cpu().half())
    return rows._replace(top_ids=torch.cat(ids), top_log_probs=torch.cat(log_probs))


def _logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    return model.logits(tokens)
