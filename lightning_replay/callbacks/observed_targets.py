"""Which of the logits in an observed call of the model predict targets of the user's batch."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_replay.data.batches import ModelInputs, inputs_and_targets
from lightning_replay.data.targets import IGNORED, following
from lightning_replay.models.hooks import ObservedForward
from lightning_replay.utilities.validation import are_ids

__all__ = ["observed_targets"]


def observed_targets(batch: Any, observed: ObservedForward, vocabulary: int, ignore_index: int) -> Tensor | None:
    """Find the observed logits whose next token is a target, neither padding nor ignored by the user's loss.

    The model may have been called on a part of the batch's columns, and may have returned logits for a part of the
    call's (``logits_to_keep``). The call's tokens are looked up in the batch, and the logits in the call. If the batch
    is of an unknown kind or holds other rows, the call's own ``labels`` or ``attention_mask`` decide.

    Args:
        batch: The batch of the step.
        observed: The call, with its logits.
        vocabulary: The number of the model's token ids.
        ignore_index: The label that the user's loss ignores; negative labels always are.

    Returns:
        A mask of shape ``(rows, positions)``, as the logits. None if neither batch nor call marks any position.

    Raises:
        MisconfigurationException: If the batch marks positions, and it can't be determined which logits are theirs.
        ValueError: If the batch's labels are not the tokens that they stand for.
    """
    assert observed.logits is not None
    try:
        inputs = inputs_and_targets(batch, vocabulary, None if ignore_index < 0 else ignore_index)
    except TypeError:
        inputs = None
    targets = None if inputs is None else _in_call(inputs, observed)
    if targets is None:
        targets = _of_call(observed)
    if targets is None and inputs is None:
        return None
    targets = None if targets is None else _kept(targets, observed)
    if targets is None:
        raise _cannot_align(inputs, observed)
    return (targets >= 0) & (targets != ignore_index)


def _in_call(inputs: ModelInputs, observed: ObservedForward) -> Tensor | None:
    """The batch's targets at the columns that the model was called on; None if these are not found, or not clearly."""
    tokens, targets = inputs.tokens, inputs.targets
    called = _tokens(observed)
    if called is None:  # such as a call with embeddings: one vector for each token
        assert observed.logits is not None
        return targets if observed.logits.shape[:2] == tokens.shape else None
    if called.shape == tokens.shape:
        return targets
    rows, length = called.shape
    if rows != len(tokens) or not 0 < length <= tokens.shape[1]:
        return None
    called = called.to(tokens.device)
    # The first column alone leaves few places, which are then compared in full.
    starts = (tokens[:, : tokens.shape[1] - length + 1] == called[:, :1]).all(0).nonzero().flatten().tolist()
    places = [slice(start, start + length) for start in starts]
    found = [targets[:, place] for place in places if torch.equal(tokens[:, place], called)]
    if not found or not all(torch.equal(each >= 0, found[0] >= 0) for each in found):
        return None
    return found[0]


def _of_call(observed: ObservedForward) -> Tensor | None:
    """The targets that the call's own arguments mark; None if it has neither labels nor a mask."""
    called = _tokens(observed)
    labels, attention = (_beside(called, observed.arguments.get(name)) for name in ("labels", "attention_mask"))
    if labels is None:
        if attention is None:
            return None
        labels = torch.zeros_like(attention, dtype=torch.int64)
    targets = following(labels)
    if attention is not None:
        padding = attention == 0
        targets = targets.masked_fill(padding | F.pad(padding[:, 1:], (0, 1)), IGNORED)
    return targets


def _beside(called: Tensor | None, value: Any) -> Tensor | None:
    """An argument with one value for each token of the call; None if it is none."""
    fits = isinstance(value, Tensor) and value.dim() == 2 and (called is None or value.shape == called.shape)
    return value if fits else None


def _kept(targets: Tensor, observed: ObservedForward) -> Tensor | None:
    """Of one target for each token of the call, those whose logits the model returned; None if that is not known."""
    assert observed.logits is not None
    shape = observed.logits.shape[:2]
    arguments = observed.arguments
    keep = arguments.get("logits_to_keep", arguments.get("num_logits_to_keep"))
    if isinstance(keep, Tensor) and keep.dim() == 1:
        targets = targets[:, keep.to(targets.device)]
    elif isinstance(keep, int) and 0 < keep < targets.shape[1]:
        targets = targets[:, -keep:]
    return targets.to(observed.logits.device) if targets.shape == shape else None


def _tokens(observed: ObservedForward) -> Tensor | None:
    """The token ids that the model was called on: its argument ``input_ids``, or else its first."""
    arguments = observed.arguments
    for value in (arguments.get("input_ids"), next(iter(arguments.values()), None)):
        if are_ids(value):
            return value
    return None


def _cannot_align(inputs: ModelInputs | None, observed: ObservedForward) -> MisconfigurationException:
    assert observed.logits is not None
    called = _tokens(observed)
    given = "no tokens" if called is None else f"tokens of shape {tuple(called.shape)}"
    held = "of another kind" if inputs is None else f"with tokens of shape {tuple(inputs.tokens.shape)}"
    return MisconfigurationException(
        f"With `loss='lwf'`, the logits of the model's call in `training_step` are compared at the targets of the "
        f"batch, but it can't be determined which logits these are: the batch is one {held}, the model was called on "
        f"{given} and returned logits of shape {tuple(observed.logits.shape)}. Call it on the batch's tokens or on "
        "consecutive columns of them, with `logits_to_keep` for a part of the logits, or pass `labels` or "
        "`attention_mask` in the call."
    )
