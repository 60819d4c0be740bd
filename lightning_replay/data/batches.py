"""Batches of any kind: counting their rows, cropping them, and joining replay rows to them."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.data.inputs import (
    ModelInputs,
    check_parts,
    find_ignore_index,
    inputs_and_targets,
    is_batch,
    labels_of,
    own_positions,
    parts_of,
    positions_of,
    right_padded,
    rows_of,
    tokens_of,
)
from lightning_replay.data.targets import IGNORED

__all__ = [
    "Batches",
    "ModelInputs",
    "PaddingSide",
    "crop_batch",
    "find_ignore_index",
    "first_batches",
    "inputs_and_targets",
    "join_rows",
    "nested_row_count",
    "right_padded",
    "row_count",
    "row_length",
    "rows_in",
    "rows_of",
    "token_count",
]

PaddingSide = Literal["left", "right"]


class Batches(Protocol):
    """A dataloader, or anything else that gives batches when it is iterated over.

    Not `Iterable`: with it, jsonargparse would accept any wrong setting in a config.
    """

    def __iter__(self) -> Iterator[Any]:
        """The batches, from the first one on."""


_ADVICE = " For another kind of batch, pass `to_batch` to `ReplayDataModule`."
_LENGTH_ADVICE = " Set `sequence_length`, the tokens in a replay row."
_COUNT_ADVICE = " Put the tokens into a tensor with one row for each row of the batch."


def first_batches(loader: Batches, most: int | None) -> Iterator[Any]:
    """The first batches of a loader, by default all: the same ones each time and in every process, if it shuffles.

    It sets the global random state of the CPU, which the caller isolates. A generator of the loader's own is left as it
    was: it may be that of the training loader, too.
    """
    torch.default_generator.manual_seed(0)  # not that of every device: some are not restored by `isolate_rng`
    generators = _generators(loader)
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(0)
    try:
        yield from islice(loader, most)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def row_count(batch: Any) -> int:
    """The number of rows in a batch that ``join_rows`` can extend: the first dimension of its tokens.

    Raises:
        TypeError: If the batch is of another kind.

    Example:
        >>> row_count({"input_ids": torch.zeros(3, 8, dtype=torch.int64)})
        3
    """
    return tokens_of(batch, _ADVICE).shape[0]


def nested_row_count(batch: Any) -> int:
    """The number of rows in a batch of any kind.

    The rows of all batches that it holds, however deep, as the batches of a ``CombinedLoader`` do (in a mapping, a
    sequence, a dataclass or another object); if there is none, the first dimension of the first tensor in it.

    Raises:
        TypeError: If there is no tensor in it.

    Example:
        >>> tokens = torch.zeros(3, 8, dtype=torch.int64)
        >>> nested_row_count({"stories": {"input_ids": tokens}, "code": (tokens, tokens)})
        6
    """
    held = _batches_in(batch)
    if held:
        return sum(row_count(each) for each in held)
    tensor = next((each for each in _tensors_in(batch) if each.dim()), None)
    if tensor is None:
        raise TypeError(
            f"The rows of a batch can't be counted: there is no tensor in a {type(batch).__name__}.{_COUNT_ADVICE}"
        )
    return tensor.shape[0]


def rows_in(batch: Any) -> int:
    """The number of rows in a batch of any kind; see ``nested_row_count`` if the kind is not known.

    Example:
        >>> rows_in({"question": torch.zeros(3, 8, dtype=torch.int64)})
        3
    """
    try:
        return row_count(batch)
    except TypeError:
        return nested_row_count(batch)


def row_length(batch: Any) -> int:
    """The number of tokens that a replay row needs in order to be as long as the rows of a batch.

    One more than the tokens of a ``(tokens, targets)`` pair, whose targets are a row shifted by one; the largest one
    for a batch that holds several.

    Raises:
        TypeError: If there are no tokens in it.

    Example:
        >>> row_length((torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)))
        9
    """
    held = _batches_in(batch) or [batch]
    return max(tokens_of(each, _LENGTH_ADVICE).shape[1] + isinstance(each, (tuple, list)) for each in held)


def token_count(batch: Any) -> int:
    """The number of tokens in a batch and in all batches that it holds, padding included; 0 if there are none.

    Example:
        >>> token_count({"input_ids": torch.zeros(3, 8, dtype=torch.int64)})
        24
    """
    return sum(tokens_of(each).numel() for each in _batches_in(batch))


def crop_batch(batch: Any, rows: int) -> Any:
    """The first rows of a batch, in a batch of the same kind.

    Raises:
        TypeError: If it holds several batches, or no tensor.
    """
    held = _batches_in(batch)
    if len(held) > 1:
        raise TypeError(
            f"A batch that holds {len(held)} batches can't be cropped to {rows} rows: it is not known of which. Use "
            "`mode='append'`, which keeps all new rows."
        )
    total = nested_row_count(batch)

    def crop(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:rows] if value.dim() and value.shape[0] == total else value
        if isinstance(value, (list, tuple)) and len(value) == total and not _tensors_in(value):
            return value[:rows]
        return _mapped(value, crop)

    return crop(batch)


def join_rows(
    batch: Any,
    rows: ReplayRows,
    *,
    padding_side: PaddingSide = "right",
    pad_token_id: int = 0,
    ignore_index: int | None = None,
    vocabulary: int | None = None,
) -> Any:
    """A batch of the new rows followed by the replay rows, padded to one length.

    - A mapping: ``input_ids`` with, where present, ``attention_mask`` (0 on padding), ``labels`` (the row's own
      tokens, ``ignore_index`` on padding), ``position_ids`` and ``token_type_ids`` (0). A value that is no tensor with
      the batch's rows stays as it is.
    - A ``(tokens, targets)`` pair, targets shifted by one: tokens ``row[:-1]``, targets ``row[1:]``.
    - A bare tensor of tokens: only rows of its own length, since nothing could mark the padding.

    Args:
        batch: The new rows.
        rows: The replay rows, on the CPU.
        padding_side: The side that padding is added on.
        pad_token_id: The token to pad with.
        ignore_index: The label of padding; by default the one that the batch leaves positions out with (see
            ``find_ignore_index``), else -100.
        vocabulary: The number of the model's token ids, if it is known: see ``inputs_and_targets``.

    Raises:
        TypeError: If the batch is of another kind, or its parts don't belong together.
        ValueError: If a part of the batch can't be extended, its rows are packed, or its labels are not the tokens that
            they stand for.

    Example:
        >>> rows = ReplayRows(torch.tensor([[7, 8, 9]]), torch.tensor([3]))
        >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]])}
        >>> join_rows(batch, rows)["labels"]
        tensor([[   1,    2, -100],
                [   7,    8,    9]])
    """
    check_parts(batch, _ADVICE)
    labels_of(batch, vocabulary, ignore_index, _ADVICE)
    if ignore_index is None:
        found = find_ignore_index(batch, vocabulary)
        ignore_index = IGNORED if found is None else found
    if isinstance(batch, Mapping):
        return _join_mapping(batch, rows, padding_side, pad_token_id, ignore_index)
    if isinstance(batch, (tuple, list)):
        inputs, targets = batch
        ours = ReplayRows(rows.tokens[:, :-1], rows.lengths - 1)
        answers = rows.tokens[:, 1:].masked_fill(~rows.targets_mask, ignore_index)
        return _rebuilt(
            batch,
            [
                _stack(inputs, _aligned(ours.tokens, ours, padding_side, pad_token_id), padding_side, pad_token_id),
                _stack(targets, _aligned(answers, ours, padding_side, ignore_index), padding_side, ignore_index),
            ],
        )
    if batch.shape[1] != rows.tokens.shape[1] or not bool(rows.mask.all()):
        raise ValueError(
            f"A bare token tensor has nothing to mark padding with, so replay rows of {rows.tokens.shape[1]} tokens "
            f"can't join rows of {batch.shape[1]}. Set `sequence_length={batch.shape[1]}`."
        )
    return _stack(batch, rows.tokens, padding_side, pad_token_id)


def _join_mapping(
    batch: Mapping[str, Any], rows: ReplayRows, side: PaddingSide, pad_token_id: int, ignore_index: int
) -> Any:
    tokens = batch["input_ids"]
    if own_positions(positions_of(batch), batch.get("attention_mask")):
        raise ValueError(
            "Replay rows can't join packed rows, whose `position_ids` begin again within a row: with more rows, the "
            f"model may no longer keep documents apart. Give each document a row of its own.{_ADVICE}"
        )
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
    """The values of each token of the rows, with the padding filled in and on its side."""
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


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers were given, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _batches_in(value: Any) -> list[Any]:
    """A batch itself, or the mappings with ``input_ids`` and the pairs of tensors that it holds, however deep."""
    if is_batch(value):
        return [value]
    return [each for part in parts_of(value) if not isinstance(part, Tensor) for each in _batches_in(part)]


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in parts_of(value) for tensor in _tensors_in(part)]


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A mapping, sequence, dataclass or other object of the same kind, with a function applied to all that it holds."""
    if isinstance(value, Mapping):
        mapped = copy.copy(value)
        for key, part in value.items():
            mapped[key] = function(part)  # type: ignore[index]
        return mapped
    if isinstance(value, (tuple, list)):
        return _rebuilt(value, [function(part) for part in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: function(getattr(value, name)) for name in fields})
    if not parts_of(value):
        return value
    mapped = copy.copy(value)
    vars(mapped).update({name: function(part) for name, part in vars(value).items()})
    return mapped


def _rebuilt(sequence: Any, parts: list[Any]) -> Any:
    """A list, tuple or named tuple of the same type with other parts."""
    return sequence._make(parts) if hasattr(sequence, "_make") else type(sequence)(parts)
