"""Joining replay rows to a batch of new rows: mappings, (tokens, targets) pairs and bare token tensors."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.utilities.validation import are_ids, described

__all__ = [
    "Batches",
    "crop_batch",
    "inputs_and_targets",
    "join_rows",
    "right_padded",
    "row_count",
    "row_length",
    "rows_in",
    "rows_of",
    "token_count",
]

PaddingSide = Literal["left", "right"]


class Batches(Protocol):
    """A dataloader, or whatever else gives batches when it is iterated over.

    Not `Iterable`, as which a config's every wrong setting would pass.
    """

    def __iter__(self) -> Iterator[Any]:
        """The batches, from the first one on."""


_ADVICE = "For another kind of batch, pass `to_batch` to `ReplayDataModule`."


def row_count(batch: Any) -> int:
    """The number of rows in a batch: the first dimension of its tokens.

    Raises:
        TypeError: If the batch is not of a kind that is known.

    Example:
        >>> row_count({"input_ids": torch.zeros(3, 8, dtype=torch.int64)})
        3
    """
    return _tokens(batch).shape[0]


def rows_in(batch: Any) -> int:
    """The number of rows in a batch of any kind; Lightning's guess if the kind is not known.

    Example:
        >>> rows_in({"question": torch.zeros(3, 8, dtype=torch.int64)})
        3
    """
    try:
        return row_count(batch)
    except TypeError:
        return extract_batch_size(batch)


def row_length(batch: Any) -> int:
    """The number of tokens that a replay row needs in order to be as long as the rows of a batch.

    One more than the tokens of a ``(tokens, targets)`` pair, whose targets are a row shifted by one.

    Example:
        >>> row_length((torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)))
        9
    """
    return _tokens(batch).shape[1] + (1 if isinstance(batch, (tuple, list)) else 0)


def token_count(batch: Any) -> int:
    """The number of tokens in a batch, padding included; 0 for a batch of a kind that is not known.

    Example:
        >>> token_count({"input_ids": torch.zeros(3, 8, dtype=torch.int64)})
        24
    """
    try:
        return _tokens(batch).numel()
    except TypeError:
        return 0


def crop_batch(batch: Any, rows: int) -> Any:
    """The first rows of a batch, in a batch of the same kind."""
    total = row_count(batch)

    def crop(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:rows] if value.dim() and value.shape[0] == total else value
        return value[:rows] if isinstance(value, (list, tuple)) and len(value) == total else value

    if isinstance(batch, Mapping):
        cropped = copy.copy(batch)
        for key, value in batch.items():
            cropped[key] = crop(value)  # type: ignore[index]
        return cropped
    if isinstance(batch, (tuple, list)):
        return type(batch)(crop(value) for value in batch)
    return crop(batch)


def join_rows(
    batch: Any,
    rows: ReplayRows,
    *,
    padding_side: PaddingSide = "right",
    pad_token_id: int = 0,
    ignore_index: int = -100,
) -> Any:
    """A batch of the new rows followed by the replay rows, padded to one length.

    - A mapping: ``input_ids`` with, where present, ``attention_mask`` (0 on padding), ``labels`` (the row's own
      tokens, ``ignore_index`` on padding), ``position_ids`` and ``token_type_ids`` (0). What is not a tensor of the
      batch's rows stays as it is.
    - A ``(tokens, targets)`` pair, targets shifted by one: tokens ``row[:-1]``, targets ``row[1:]``.
    - A bare tensor of tokens: only rows of its own length, since nothing could mark the padding.

    Args:
        batch: The new rows.
        rows: The replay rows, on the CPU.
        padding_side: Where padding goes.
        pad_token_id: The token to pad with.
        ignore_index: The label of padding.

    Raises:
        TypeError: If the batch is of another kind, or its parts don't belong together.
        ValueError: If a part of the batch can't be extended.

    Example:
        >>> rows = ReplayRows(torch.tensor([[7, 8, 9]]), torch.tensor([3]))
        >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]])}
        >>> join_rows(batch, rows)["labels"]
        tensor([[   1,    2, -100],
                [   7,    8,    9]])
    """
    _check_parts(batch)
    if isinstance(batch, Mapping):
        return _join_mapping(batch, rows, padding_side, pad_token_id, ignore_index)
    if isinstance(batch, (tuple, list)):
        inputs, targets = _tokens(batch), batch[1]
        ours = ReplayRows(rows.tokens[:, :-1], rows.lengths - 1)
        answers = rows.tokens[:, 1:].masked_fill(~rows.targets_mask, ignore_index)
        return type(batch)(
            (
                _stack(inputs, _aligned(ours.tokens, ours, padding_side, pad_token_id), padding_side, pad_token_id),
                _stack(targets, _aligned(answers, ours, padding_side, ignore_index), padding_side, ignore_index),
            )
        )
    tokens = _tokens(batch)
    if tokens.shape[1] != rows.tokens.shape[1] or not bool(rows.mask.all()):
        raise ValueError(
            f"A bare token tensor has nothing to mark padding with, so replay rows of {rows.tokens.shape[1]} tokens "
            f"can't join rows of {tokens.shape[1]}. Set `sequence_length={tokens.shape[1]}`."
        )
    return _stack(tokens, rows.tokens, padding_side, pad_token_id)


def _join_mapping(
    batch: Mapping[str, Any], rows: ReplayRows, side: PaddingSide, pad_token_id: int, ignore_index: int
) -> Any:
    tokens = _tokens(batch)
    padded = tokens.shape[1] != rows.tokens.shape[1] or not bool(rows.mask.all())
    marks_padding = "attention_mask" in batch or ("labels" in batch and side == "right")
    if padded and not marks_padding:
        raise ValueError(
            f"Replay rows of {rows.tokens.shape[1]} tokens can't join rows of {tokens.shape[1]} in a batch of "
            f"{sorted(batch)}: nothing in it would mark the padding on the {side}. Add `attention_mask` and `labels` "
            f"to the batch, or set `sequence_length={tokens.shape[1]}`."
        )
    mask = _aligned(rows.mask.long(), rows, side, 0)
    labels = rows.tokens if rows.targets is None else rows.tokens.masked_fill(~rows.targets, ignore_index)
    ours = {
        "input_ids": (_aligned(rows.tokens, rows, side, pad_token_id), pad_token_id),
        "labels": (_aligned(labels, rows, side, ignore_index), ignore_index),
        "attention_mask": (mask, 0),
        "position_ids": ((mask.cumsum(1) - 1).clamp(min=0), 0),
        "token_type_ids": (torch.zeros_like(mask), 0),
    }
    joined = copy.copy(batch)
    for key, value in batch.items():
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != tokens.shape[0]:
            continue
        if key not in ours or value.shape != tokens.shape:
            raise ValueError(
                f"Replay rows have nothing to put under the batch's key {key!r} of shape {tuple(value.shape)}. Build "
                "the mixed batch yourself with `ReplayDataModule(to_batch=...)`, or drop the key from the batch."
            )
        rows_value, padding = ours[key]
        joined[key] = _stack(value, rows_value, side, padding)  # type: ignore[index]
    return joined


def _aligned(values: Tensor, rows: ReplayRows, side: PaddingSide, padding: int) -> Tensor:
    """What belongs to each token of the rows, with the padding filled in and on its side."""
    values = values.masked_fill(~rows.mask, padding)
    if side == "right":
        return values
    places = torch.arange(values.shape[1]) + rows.lengths.unsqueeze(1)
    return values.gather(1, places % values.shape[1])


def _stack(new: Tensor, ours: Tensor, side: PaddingSide, padding: int) -> Tensor:
    """The new rows and ours in one tensor, padded to the longer of the two."""
    length = max(new.shape[1], ours.shape[1])

    def widen(values: Tensor) -> Tensor:
        missing = length - values.shape[1]
        return F.pad(values, (missing, 0) if side == "left" else (0, missing), value=padding)

    return torch.cat([widen(new), widen(ours.to(new.device, new.dtype))])


def _tokens(batch: Any) -> Tensor:
    tokens = batch
    if isinstance(batch, Mapping):
        tokens = batch.get("input_ids")
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        tokens = batch[0]
    if not are_ids(tokens) or tokens.is_meta or not tokens.shape[1]:
        given = f"a mapping with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else described(batch)
        if tokens is not batch and tokens is not None:
            given += f", its tokens {described(tokens)}"
        raise TypeError(
            "A batch is a mapping with `input_ids`, a pair (tokens, targets) or a tensor of tokens, whole numbers of "
            f"shape (rows, length), padded to one length; got {given}. {_ADVICE}"
        )
    return tokens


def _check_parts(batch: Any) -> None:
    """Refuse a batch whose parts have not one value for each token, on the tokens' device."""
    tokens = _tokens(batch)
    parts: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        parts = {name: batch[name] for name in ("attention_mask", "labels") if batch.get(name) is not None}
    elif isinstance(batch, (tuple, list)):
        parts = {"targets": batch[1]}
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.shape != tokens.shape or part.device != tokens.device:
            raise TypeError(
                f"The batch's `{name}` have one value for each of its tokens, which are {described(tokens)}; got "
                f"{described(part)}. {_ADVICE}"
            )


def inputs_and_targets(batch: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """What a language model is asked on a batch, and what it should answer.

    Args:
        batch: A mapping with ``input_ids`` (and ``labels`` and ``attention_mask`` where present), a
            ``(tokens, targets)`` pair, or a tensor of tokens.

    Returns:
        Tokens, attention mask (None where the batch has none) and targets, each of shape ``(rows, length)``;
        ``targets[:, t]`` is what follows ``tokens[:, t]``, -100 where nothing is asked, as after padding.

    Raises:
        TypeError: If the batch is of another kind, or its parts don't belong together.

    Example:
        >>> inputs_and_targets(torch.tensor([[1, 2, 3]]))
        (tensor([[1, 2, 3]]), None, tensor([[   2,    3, -100]]))
    """
    _check_parts(batch)
    tokens = _tokens(batch)
    if isinstance(batch, (tuple, list)):
        return tokens, None, batch[1]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None:
        labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return tokens, mask, targets if mask is None else targets.masked_fill(mask == 0, -100)


def right_padded(batch: Any) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a batch, padding moved to the right, where no causal model sees it: it needs no mask.

    Args:
        batch: As for ``inputs_and_targets``.

    Raises:
        TypeError: If the batch is of another kind, or its parts don't belong together.

    Example:
        >>> right_padded({"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])})
        (tensor([[5, 6, 0]]), tensor([[   6, -100, -100]]))
    """
    tokens, mask, targets = inputs_and_targets(batch)
    if mask is None:
        return tokens, targets
    order = (mask == 0).long().argsort(dim=1, stable=True)
    return tokens.gather(1, order), targets.gather(1, order)


def rows_of(batch: Any) -> ReplayRows:
    """The rows of a batch as rows to replay: padding moved to the right, and as targets what the batch has as targets.

    Args:
        batch: A mapping with ``input_ids`` (and ``labels`` and ``attention_mask`` where present), a
            ``(tokens, targets)`` pair, or a tensor of tokens.

    Raises:
        TypeError: If the batch is of another kind.

    Example:
        >>> batch = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
        >>> rows_of(batch).tokens, rows_of(batch).lengths
        (tensor([[5, 6, 0]]), tensor([2]))
    """
    tokens, mask, targets = inputs_and_targets(batch)
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
