"""A replay buffer's state in a file: safetensors, or Parquet for other tools. Reading never executes anything."""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from lightning_replay.buffers.rows import pack_tokens, unpack_tokens
from lightning_replay.utilities.io import atomic_write

__all__ = [
    "cached_columns",
    "cached_of",
    "read_state",
    "token_columns",
    "tokens_of",
    "write_state",
]

_KEY = "lightning_replay_buffer"
"""The key of the state's numbers and strings, as JSON, in a file's metadata."""


def write_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write what ``ReplayBuffer.state_dict`` returned, in the format of the suffix.

    Raises:
        ValueError: If the suffix is neither ``.safetensors`` nor ``.parquet``.
        OSError: If the file can't be written; an earlier file is then unchanged.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}
    write = _format_of(path).write
    with atomic_write(path) as temporary:
        write(temporary, tensors, values)


def read_state(path: str | Path) -> dict[str, Any]:
    """Read what ``write_state`` wrote. The caller has to check the state.

    Raises:
        ValueError: If the suffix is neither ``.safetensors`` nor ``.parquet``, or the file is damaged.
        FileNotFoundError: If there is no such file.
    """
    read = _format_of(path).read
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {Path(path).absolute()} to load a replay buffer from.")
    try:
        return read(Path(path))
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{path} is not a complete file of a replay buffer: {type(error).__name__}: {error}. Load a file that "
            "`ReplayBuffer.save` wrote."
        ) from error


class _Format(NamedTuple):
    write: Callable[[Path, dict[str, Tensor], dict[str, Any]], None]
    read: Callable[[Path], dict[str, Any]]


def _format_of(path: str | Path) -> _Format:
    formats = {
        ".safetensors": _Format(_write_safetensors, _read_safetensors),
        ".parquet": _Format(_write_parquet, _read_parquet),
    }
    suffix = Path(path).suffix
    if suffix not in formats:
        raise ValueError(f"The file of a replay buffer ends in {' or '.join(map(repr, formats))}; got {str(path)!r}.")
    return formats[suffix]


def _write_safetensors(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    # `save_file` hides the OSError and makes a file that only its owner can read, so serialize to bytes first.
    path.write_bytes(safetensors.torch.save(tensors, {_KEY: json.dumps(values)}))


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors | dict(json.loads(metadata[_KEY]))


def _write_parquet(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    stored = tensors["tokens"]
    ids, targets = unpack_tokens(stored)
    columns = token_columns(ids, tensors["lengths"], targets)
    columns |= {"uses": pa.array(tensors["uses"].numpy()), "step": pa.array(tensors["steps"].numpy())}
    if values["top_k"]:
        columns |= cached_columns(tensors["top_ids"], tensors["top_log_probs"])
    order = {
        "deck": tensors["deck"].tolist(),
        "generator": base64.b64encode(tensors["generator"].numpy().tobytes()).decode(),
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({_KEY: json.dumps(values | order)}), path)


def _read_parquet(path: Path) -> dict[str, Any]:
    with pq.ParquetFile(path) as file:
        values = dict(json.loads((file.schema_arrow.metadata or {})[_KEY.encode()]))
        length, top_k = int(values["length"]), int(values["top_k"])
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        claimed = max((group.column(i).num_values for group in groups for i in range(group.num_columns)), default=0)
        # A small compressed file can claim any number of equal values: check before reading them into memory.
        if claimed > file.metadata.num_rows * length * (top_k + 1):
            raise ValueError(f"a column holds {claimed} values, more than its rows have")
        table = file.read()
    tokens, lengths, targets = tokens_of(table, length)
    top_ids, top_log_probs = cached_of(table, length, top_k)
    return values | {
        "tokens": pack_tokens(tokens, targets),
        "lengths": lengths,
        "uses": _tensor(table["uses"]),
        "steps": _tensor(table["step"]),
        "deck": torch.tensor(values["deck"], dtype=torch.int64),
        "generator": torch.tensor(list(base64.b64decode(values["generator"])), dtype=torch.uint8),
        "top_ids": top_ids,
        "top_log_probs": top_log_probs,
    }


def token_columns(tokens: Tensor, lengths: Tensor, targets: Tensor) -> dict[str, Any]:
    """Rows as Parquet columns ``tokens``, ``targets`` and ``length``, without their padding.

    Args:
        tokens: Token ids, shape ``(rows, length)``.
        lengths: Real tokens in each row, shape ``(rows,)``.
        targets: True on the tokens that contribute to a loss, the tokens' shape.
    """
    real = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
    ends = pa.array(F.pad(lengths.cumsum(0), (1, 0)).numpy())
    return {
        "tokens": pa.LargeListArray.from_arrays(ends, pa.array(tokens[real].numpy())),
        "targets": pa.LargeListArray.from_arrays(ends, pa.array(targets[real].numpy())),
        "length": pa.array(lengths.numpy()),
    }


def cached_columns(top_ids: Tensor, top_log_probs: Tensor) -> dict[str, Any]:
    """A reference's cached log-probabilities as Parquet columns ``top_ids`` and ``top_log_probs``."""
    columns = {}
    # Not all tools read 16-bit floats, and 32-bit ones are hardly larger once compressed.
    for name, cached in {"top_ids": top_ids, "top_log_probs": top_log_probs.float()}.items():
        _, positions, kept = cached.shape
        lists = pa.FixedSizeListArray.from_arrays(pa.array(cached.flatten().numpy()), kept)
        columns[name] = pa.FixedSizeListArray.from_arrays(lists, positions)
    return columns


def tokens_of(table: Any, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, lengths and targets of a table with the columns of ``token_columns``, padded to ``length``.

    Padding is token 0 and never a target.

    Raises:
        ValueError: If the columns don't fit together.
    """
    columns = {name: table[name].combine_chunks() for name in ("tokens", "targets", "length")}
    ids, marks, lengths = (_tensor(column) for column in columns.values())
    real = torch.arange(length) < lengths.unsqueeze(1)
    for name in ("tokens", "targets"):
        if columns[name].value_lengths().to_pylist() != real.sum(1).tolist():
            raise ValueError(f"`length` is not the number of `{name}` in each row")
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"`tokens` holds {int(ids.min())}")
    tokens, targets = torch.zeros(real.shape, dtype=ids.dtype), torch.zeros(real.shape, dtype=torch.bool)
    tokens[real], targets[real] = ids, marks
    return tokens, lengths, targets


def cached_of(table: Any, length: int, top_k: int) -> tuple[Tensor, Tensor]:
    """``top_ids`` and ``top_log_probs`` of a table with the columns of ``cached_columns``; empty if ``top_k`` is 0."""
    cached = []
    for name, kept, dtype in (("top_ids", top_k, torch.int32), ("top_log_probs", top_k + 1, torch.float16)):
        shape = (table.num_rows, length - 1, kept if top_k else 0)
        column = _tensor(table[name].combine_chunks()).view(shape) if top_k else torch.zeros(shape, dtype=dtype)
        cached.append(column.half() if column.dtype == torch.float32 else column)
    return cached[0], cached[1]


def _tensor(column: Any) -> Tensor:
    """All numbers of a column; lists are concatenated."""
    while not column.null_count and pa.types.is_nested(column.type):
        column = column.flatten()
    return torch.tensor(column.to_numpy(zero_copy_only=False))
