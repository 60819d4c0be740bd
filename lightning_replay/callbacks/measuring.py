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
    before, in_chunks = None, heads.of(model) is not None
    if in_chunks and reference is not None:
        before = reference_hidden(heads, reference, model, call)
        in_chunks = before is not None

    def measure(given: HiddenStates) -> bool:
        flat = targets.flatten()
        selected = (flat != loss.ignore_index).nonzero().squeeze(1)
        reference_chunks = None if before is None else chunk_logits(before.head, before.states, selected)
        for place, chunk in chunk_logits(given.head, given.states, selected):
            logits, wanted = chunk.unsqueeze(0), flat[place].unsqueeze(0)  # as one row
            loss.update(logits, wanted)
            accuracy.update(logits, wanted)
            if reference_chunks is not None:
                theirs = next(reference_chunks)[1].to(logits.device)
                drift.update(logits, theirs.unsqueeze(0), wanted)
        return True

    if in_chunks:
        with evaluating(model.module), torch.no_grad():
            if heads.run(model, call, measure):
                return
    with evaluating(model.module):
        logits = call(model)
    loss.update(logits, targets)
    accuracy.update(logits, targets)
    if reference is not None:
        with reference.active() as asked:
            drift.update(logits, call(asked), targets)
