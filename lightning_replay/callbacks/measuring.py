"""Measuring a model on a batch, without logits of the whole batch if that is possible."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_replay.head_chunks import chunk_logits
from lightning_replay.metrics import KLDrift, TokenAccuracy, TokenLoss
from lightning_replay.models.head import HiddenStates, OutputHeads
from lightning_replay.models.language_model import LanguageModel, evaluating
from lightning_replay.references.hidden import reference_hidden
from lightning_replay.references.models import ReferenceModel

__all__ = ["update_metrics"]


def update_metrics(
    heads: OutputHeads,
    model: LanguageModel,
    reference: ReferenceModel | None,
    call: Callable[[LanguageModel], Tensor],
    targets: Tensor,
    loss: TokenLoss,
    accuracy: TokenAccuracy,
    drift: KLDrift,
) -> None:
    """Add a batch to the metrics, in evaluation mode and without gradients.

    Args:
        heads: The output heads found so far.
        model: The model.
        reference: The reference that ``drift`` compares it with; None to leave that out.
        call: Calls the model that it is given on the batch, and returns its logits.
        targets: The next token of each position, shape ``(rows, positions)``.
        loss: The metrics, on the device of the targets.
        accuracy: As ``loss``.
        drift: As ``loss``.
    """
    if _update_in_chunks(heads, model, reference, call, targets, loss, accuracy, drift):
        return
    with evaluating(model.module):
        logits = call(model)
    loss.update(logits, targets)
    accuracy.update(logits, targets)
    if reference is not None:
        with reference.active() as before:
            drift.update(logits, call(before), targets)


def _update_in_chunks(
    heads: OutputHeads,
    model: LanguageModel,
    reference: ReferenceModel | None,
    call: Callable[[LanguageModel], Tensor],
    targets: Tensor,
    loss: TokenLoss,
    accuracy: TokenAccuracy,
    drift: KLDrift,
) -> bool:
    """Add a batch a chunk of positions at a time; False, and nothing is added, if whole logits are to be taken."""
    if heads.of(model) is None:
        return False
    before = None
    if reference is not None:
        before = reference_hidden(heads, reference, model, call)
        if before is None:
            return False
    flat = targets.flatten()
    selected = (flat != loss.ignore_index).nonzero().squeeze(1)

    def measure(given: HiddenStates) -> bool:
        chunks = chunk_logits(given.head, given.states, selected)
        reference_chunks = None if before is None else chunk_logits(before.head, before.states, selected)
        for place, chunk in chunks:
            logits, wanted = chunk.unsqueeze(0), flat[place].unsqueeze(0)  # as one row
            loss.update(logits, wanted)
            accuracy.update(logits, wanted)
            if reference_chunks is not None:
                theirs = next(reference_chunks)[1].to(logits.device)
                drift.update(logits, theirs.unsqueeze(0), wanted)
        return True

    with evaluating(model.module), torch.no_grad():
        return bool(heads.run(model, call, measure))
