"""Reading batches: what a language model is given, what it is to predict, and the rows that can be replayed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.data.targets import IGNORED, checked_labels, find_marker, following
from lightning_replay.utilities.validation import are_ids, described, is_integer

__all__ = [
    "ModelInputs",
    "check_parts",
    "find_ignore_index",
    "inputs_and_targets",
    "is_batch",
    "labels_of",
    "own_positions",
    "parts_of",
    "positions_of",
    "right_padded",
    "rows_of",
    "tokens_of",
]

_READ = (
    " Pass a loader whose `collate_fn` returns one of these, such as {'input_ids': tokens, 'labels': labels}; of a "
    "batch that holds several, pass the loader of each by itself."
)
_OTHER_TARGETS = (
    "targets",
    "target_ids",
    "label_ids",
    "shift_labels",
    "loss_mask",
    "completion_mask",
    "assistant_mask",
    "assistant_masks",
)
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


class ModelInputs(NamedTuple):
    """What a language model is given for a batch, and what it is to predict.

    Attributes:
        tokens: Token ids, shape ``(rows, length)``.
        attention_mask: Zero on padding, the same shape; None if the batch has none.
        targets: The token after each of ``tokens``, -100 where no loss is taken, the same shape.
        position_ids: The positions that the batch gives to its tokens, the same shape; None if it gives none.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    targets: Tensor
    position_ids: Tensor | None = None

    @property
    def has_own_positions(self) -> bool:
        """Whether the positions are others than 0, 1, 2, … from the first real token of a row on.

        They are in packed rows, in which they begin again with each document: without them a model attends across
        documents.
        """
        return own_positions(self.position_ids, self.attention_mask)

    def right_padded(self) -> "ModelInputs":
        """The same rows with padding moved to the right, where a causal model does not see it: no mask is needed.

        Rows with positions of their own stay as they are, since a model may read packed rows off mask and positions.

        Example:
            >>> batch = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
            >>> inputs_and_targets(batch).right_padded().tokens
            tensor([[5, 6, 0]])
        """
        if self.has_own_positions:
            return self
        if self.attention_mask is None:
            return ModelInputs(self.tokens, None, self.targets)
        order = (self.attention_mask == 0).long().argsort(dim=1, stable=True)
        return ModelInputs(self.tokens.gather(1, order), None, self.targets.gather(1, order))


def inputs_and_targets(batch: Any, vocabulary: int | None = None, ignore_index: int | None = None) -> ModelInputs:
    """What a language model is given for a batch, and what it is to predict.

    A label leaves its position out if it is negative, not in the vocabulary, ``ignore_index``, or the token id with
    which the batch marks padding. Every other label is checked against the token that it stands for.

    Args:
        batch: A mapping with ``input_ids`` (and, where present, ``labels``, ``attention_mask`` and ``position_ids``), a
            ``(tokens, targets)`` pair, or a tensor of tokens.
        vocabulary: The number of the model's token ids; labels from there on are left out. None if it is not known.
        ignore_index: The label that is left out; by default it is found.

    Raises:
        TypeError: If the batch is of another kind, or its parts don't belong together.
        ValueError: If the labels or targets are not the tokens that they stand for, as if they are shifted already.

    Example:
        >>> inputs_and_targets(torch.tensor([[1, 2, 3]])).targets
        tensor([[   2,    3, -100]])
    """
    check_parts(batch, _READ)
    tokens, mask = tokens_of(batch), _mask(batch)
    labels = labels_of(batch, vocabulary, ignore_index, _READ)
    if isinstance(batch, (tuple, list)):
        return ModelInputs(tokens, None, labels)
    targets = following(labels)
    return ModelInputs(
        tokens, mask, targets if mask is None else targets.masked_fill(mask == 0, IGNORED), positions_of(batch)
    )


def right_padded(batch: Any) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a batch, padding moved to the right, where no causal model sees it: it needs no mask.

    Args:
        batch: As for ``inputs_and_targets``.

    Raises:
        TypeError: If the batch is of another kind, its parts don't belong together, or it gives its tokens positions
            of their own, which would be lost: ``inputs_and_targets`` keeps them.
        ValueError: If the labels or targets are not the tokens that they stand for.

    Example:
        >>> right_padded({"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])})
        (tensor([[5, 6, 0]]), tensor([[   6, -100, -100]]))
    """
    inputs = inputs_and_targets(batch)
    if inputs.has_own_positions:
        raise TypeError(_packed("can't be given to a model by their tokens alone"))
    return inputs.right_padded()[::2]


def rows_of(batch: Any, vocabulary: int | None = None, ignore_index: int | None = None) -> ReplayRows:
    """The rows of a batch as rows to replay: padding moved to the right, and as targets what the batch has as targets.

    Args:
        batch: As for ``inputs_and_targets``.
        vocabulary: As for ``inputs_and_targets``.
        ignore_index: As for ``inputs_and_targets``.

    Raises:
        TypeError: If the batch is of another kind, its parts don't belong together, or its rows are packed.
        ValueError: If the labels or targets are not the tokens that they stand for.

    Example:
        >>> batch = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
        >>> rows_of(batch).tokens, rows_of(batch).lengths
        (tensor([[5, 6, 0]]), tensor([2]))
    """
    inputs = inputs_and_targets(batch, vocabulary, ignore_index)
    if inputs.has_own_positions:
        raise TypeError(_packed("can't be replayed, since replay rows keep no positions"))
    tokens, mask, targets, _ = inputs
    if isinstance(batch, (tuple, list)):
        # A row's last token is among the targets alone, also where padding follows; one that is left out is not known.
        answers = torch.where(targets >= 0, targets, F.pad(tokens[:, 1:], (0, 1)))
        tokens = torch.cat([tokens[:, :1], answers], 1)
    else:
        targets = targets[:, :-1]
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    if isinstance(batch, (tuple, list)):
        real[:, -1] = targets[:, -1] >= 0
    is_target = F.pad(targets >= 0, (1, 0), value=True)
    order = (~real).long().argsort(dim=1, stable=True)
    return ReplayRows(tokens.gather(1, order), real.sum(1), (is_target & real).gather(1, order))


def find_ignore_index(batch: Any, vocabulary: int | None = None) -> int | None:
    """The label with which a batch leaves positions out.

    The most frequent negative label (or one that is not in the vocabulary); else the one label of all padding that
    ``attention_mask`` marks; else the token id that takes the place of labels (see ``targets.find_marker``).

    Args:
        batch: As for ``inputs_and_targets``.
        vocabulary: The number of the model's token ids, if it is known.

    Returns:
        The label, or None if the batch shows none, as if nothing in it is left out.

    Raises:
        TypeError: If the batch is of another kind, or its parts don't belong together.

    Example:
        >>> find_ignore_index((torch.tensor([[5, 6, 0]]), torch.tensor([[6, -1, -1]])))
        -1
    """
    check_parts(batch, _READ)
    given = (
        batch[1] if isinstance(batch, (tuple, list)) else batch.get("labels") if isinstance(batch, Mapping) else None
    )
    if given is None:
        return None
    labels, mask = given.long(), _mask(batch)
    outside = labels < 0
    if vocabulary is not None:
        outside = outside | (labels >= vocabulary)
    if bool(outside.any()):
        return int(labels[outside].mode().values)
    if mask is not None:
        of_padding = torch.unique(labels[mask == 0])
        if len(of_padding) == 1:
            return int(of_padding)
    return find_marker(tokens_of(batch), labels, mask, isinstance(batch, (tuple, list)), vocabulary)


def labels_of(batch: Any, vocabulary: int | None, ignore_index: int | None, advice: str) -> Tensor:
    """The labels of a batch, or the targets of a pair, -100 on what is left out; checked as ``checked_labels`` does."""
    tokens, mask = tokens_of(batch), _mask(batch)
    shifted = isinstance(batch, (tuple, list))
    labels = batch[1] if shifted else batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None:
        return tokens.long() if mask is None else tokens.long().masked_fill(mask == 0, IGNORED)
    return checked_labels(
        tokens, labels, mask, shifted=shifted, vocabulary=vocabulary, ignore_index=ignore_index, advice=advice
    )


def parts_of(value: Any) -> list[Any]:
    """What a mapping, a sequence, a dataclass or another object holds; nothing of a tensor, a text or a number."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, (Tensor, str, bytes)) or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).values())


def is_batch(batch: Any) -> bool:
    """Whether a batch is a mapping with ``input_ids``, a pair whose first part is tokens, or a tensor of tokens."""
    tokens = _tokens_part(batch)
    return are_ids(tokens) and not tokens.is_meta and bool(tokens.shape[1])


def tokens_of(batch: Any, advice: str = _READ) -> Tensor:
    """The tokens of a batch, shape ``(rows, length)``.

    Args:
        batch: A mapping with ``input_ids``, a ``(tokens, targets)`` pair, or a tensor of tokens.
        advice: What ends the error message.

    Raises:
        TypeError: If the batch is of another kind.
    """
    tokens = _tokens_part(batch)
    if not is_batch(batch):
        given = f"a mapping with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else described(batch)
        if tokens is not batch and tokens is not None:
            given += f", its tokens {described(tokens)}"
        raise TypeError(
            "A batch is a mapping with `input_ids`, a pair (tokens, targets) or a tensor of tokens, whole numbers of "
            f"shape (rows, length), padded to one length; got {given}.{advice}"
        )
    found: Tensor = tokens
    return found


def check_parts(batch: Any, advice: str) -> None:
    """Refuse a batch whose parts have not one value for each token, on the tokens' device.

    Raises:
        TypeError: With what was given, and ``advice`` at the end.
    """
    tokens = tokens_of(batch, advice)
    parts: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        parts = {name: batch[name] for name in ("attention_mask", "labels") if batch.get(name) is not None}
        others = [name for name in _OTHER_TARGETS if getattr(batch.get(name), "shape", None) == tokens.shape]
        if others and "labels" not in parts:
            raise TypeError(
                f"The batch holds {others} but no `labels`, so a loss would be taken on every token. Put a copy of "
                f"`input_ids` under `labels`, with -100 where no loss is taken.{advice}"
            )
    elif isinstance(batch, (tuple, list)):
        parts = {"targets": batch[1]}
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.shape != tokens.shape or part.device != tokens.device:
            raise TypeError(
                f"The batch's `{name}` have one value for each of its tokens, which are {described(tokens)}; got "
                f"{described(part)}.{advice}"
            )
        if name != "attention_mask" and not is_integer(part):
            raise TypeError(
                f"The batch's `{name}` are token ids, whole numbers; got {described(part)}. If that is a mask, pass "
                f"{{'input_ids': tokens, 'attention_mask': mask}}.{advice}"
            )


def own_positions(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether positions are others than 0, 1, 2, … on the real tokens of each row."""
    if positions is None:
        return False
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask != 0
    return bool((positions != real.long().cumsum(1) - 1)[real].any())


def positions_of(batch: Any) -> Tensor | None:
    """The batch's `position_ids`, one for each token.

    Raises:
        TypeError: If they are of another shape, or the batch tells documents apart by something else alone.
    """
    if not isinstance(batch, Mapping):
        return None
    tokens, positions = tokens_of(batch), batch.get("position_ids")
    if positions is None:
        packing = [name for name in _PACKING if batch.get(name) is not None]
        if packing:
            raise TypeError(
                f"The batch tells packed documents apart by {packing}, which can't be passed on. Add `position_ids` "
                "that begin again at 0 with each document, or give each document a row of its own."
            )
        return None
    if isinstance(positions, Tensor) and positions.shape == (1, tokens.shape[1]):
        positions = positions.expand_as(tokens)
    if not isinstance(positions, Tensor) or positions.shape != tokens.shape or positions.device != tokens.device:
        raise TypeError(
            f"The batch's `position_ids` have one value for each of its tokens, which are {described(tokens)}; got "
            f"{described(positions)}. Leave them out if they are the model's default."
        )
    return positions


def _tokens_part(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("input_ids")
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


def _mask(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def _packed(problem: str) -> str:
    return (
        f"The batch's `position_ids` begin again within a row or don't begin at 0: such packed rows {problem}. Give "
        "each document a row of its own, or leave `position_ids` out if the model is to see rows as one text."
    )
