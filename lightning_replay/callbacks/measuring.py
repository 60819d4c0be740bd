"""Measuring a model on a set of batches, without logits of a whole batch if that is possible."""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_replay.callbacks.own_samples import OwnSamples, SampleDrift
from lightning_replay.callbacks.prior_sets import checked_inputs
from lightning_replay.data.inputs import ModelInputs
from lightning_replay.head_chunks import chunk_logits
from lightning_replay.metrics import KLDrift, TokenAccuracy, TokenLoss
from lightning_replay.models.head import HiddenStates, OutputHeads
from lightning_replay.models.language_model import LanguageModel, evaluating
from lightning_replay.references.hidden import reference_hidden
from lightning_replay.references.models import ReferenceModel

__all__ = ["Measured", "measure_set", "update_metrics"]


class Measured(NamedTuple):
    """What was measured on a set.

    Attributes:
        loss: Next-token loss, in nats a token.
        accuracy: Share of next tokens that are the model's most likely ones.
        kl: KL divergence from the reference to the model, in nats a token; None without a reference.
        kl_error: Its standard error over samples; None but on samples of the reference.
    """

    loss: float
    accuracy: float
    kl: float | None
    kl_error: float | None


def measure_set(
    name: str,
    batches: Iterable[Any],
    model: LanguageModel,
    reference: ReferenceModel | None,
    heads: OutputHeads,
    device: torch.device,
    samples: OwnSamples | None = None,
    shared: bool = True,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Measured:
    """Measure a model on a set, in evaluation mode and without gradients.

    Args:
        name: The set's name, for messages.
        batches: The batches that this process measures, such as ``inputs_and_targets`` reads.
        model: The model.
        reference: The reference that it is compared with; None to leave that out.
        heads: The output heads found so far.
        device: The device to measure on.
        samples: Whose rows the batches are, if they are samples of the reference: their divergence has an error.
        shared: Whether each of several processes measures batches of its own.
        context: Entered for each batch.

    Raises:
        MisconfigurationException: If a batch can't be measured, or none has a token to predict.
    """
    loss, accuracy = TokenLoss().to(device), TokenAccuracy().to(device)
    drift = (KLDrift() if samples is None else SampleDrift(sync_on_compute=shared)).to(device)
    for batch in batches:
        inputs = checked_inputs(name, batch, model)
        targets = inputs.targets.to(device)
        with context():
            call = functools.partial(_logits, inputs=inputs, device=device)
            update_metrics(heads, model, reference, call, targets, loss, accuracy, drift)
        if isinstance(drift, SampleDrift) and samples is not None:
            drift.end_batch(samples.sizes(targets))
    with loss.sync_context():
        empty = not loss.count
    if empty:
        raise MisconfigurationException(
            f"The prior set {name!r} gave no batch with a token to predict, so nothing can be measured on it. Pass "
            "a loader that can be read more than once, with at least one row of two tokens."
        )
    return Measured(
        float(loss.compute()),
        float(accuracy.compute()),
        None if reference is None else float(drift.compute()),
        drift.standard_error() if isinstance(drift, SampleDrift) else None,
    )


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


def _logits(model: LanguageModel, inputs: ModelInputs, device: torch.device) -> Tensor:
    """The logits of a model on a batch, given what the user's own call gives it.

    Padding on the right needs no mask. Packed rows keep theirs: whether a model then keeps documents apart is up to it.
    """
    if not inputs.has_own_positions:
        return model.logits(inputs.tokens.to(device))
    mask, positions = inputs.attention_mask, inputs.position_ids
    assert positions is not None
    return model.logits(inputs.tokens.to(device), None if mask is None else mask.to(device), positions.to(device))
