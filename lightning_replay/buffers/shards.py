"""Replay rows in a folder of Parquet shards, written once and read as they are needed."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_replay.buffers.files import cached_columns, cached_of, token_columns, tokens_of
from lightning_replay.buffers.manifest import Manifest, ShardFile, sha256_of
from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.models.language_model import LanguageModel, weights_hash
from lightning_replay.utilities.io import atomic_write
from lightning_replay.utilities.seeds import order_seed, stream
from lightning_replay.utilities.validation import is_whole

__all__ = ["ReplayShards", "write_shard"]

_GROUP = 64
"""Rows that are compressed together, which is the smallest number of rows to read."""


class ReplayShards:
    """Replay rows that ``lightning-replay generate`` wrote to a folder.

    Rows are read from the disk a few at a time, in order, and again from the first after the last. Only those few are
    held in memory. With several processes, each of them reads the folder, so all need it under the same path.

    Args:
        folder: The folder of rows.
        shuffle: Whether to read the shards in random order, a different one in each round.
        seed: Seed of that order.
        read_rows: Number of rows to read at a time. Among these, rows are drawn in random order.
        check_model: Whether to refuse rows from another model than the one that trains. If False, the model that
            wrote the rows is the reference, whichever it is.

    Attributes:
        manifest: The folder's manifest.
        position: Number of rows read so far, in all rounds.
        with_log_probs: Whether to read the log-probabilities stored with the rows as well.

    Raises:
        FileNotFoundError: If the folder has no manifest, or lacks a shard.
        ValueError: If an argument is out of its range, rows are still missing, or a shard has changed since it was
            written.

    Example:
        >>> from lightning_replay import ReplayDataModule, ReplayShards
        >>> shards = ReplayShards("rows", shuffle=True)  # doctest: +SKIP
        >>> data = ReplayDataModule(loader, replay_fraction=0.2, buffer=shards)  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | Path,
        shuffle: bool = False,
        seed: int = 0,
        read_rows: int = 256,
        check_model: bool = True,
    ) -> None:
        if not is_whole(seed, 0):
            raise ValueError(f"`seed` is a whole number, at least 0; got {seed!r}.")
        if not is_whole(read_rows, 1):
            raise ValueError(f"`read_rows` is how many rows to read at a time, at least 1; got {read_rows!r}.")
        self.folder = Path(folder)
        self.shuffle = shuffle
        self.seed = seed
        self.check_model = check_model
        self.manifest = Manifest.read(self.folder)
        self.position = 0
        self.with_log_probs = False
        again = "Run `lightning-replay generate` again with the same settings: it writes the missing shards."
        if self.manifest.missing:
            raise ValueError(
                f"{folder} is not finished: {len(self.manifest.missing)} of {self.manifest.planned} shards are "
                f"missing. {again}"
            )
        for shard in self.manifest.shards.values():
            path = self.folder / shard.file
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, but the manifest lists it. {again}")
            if path.stat().st_size != shard.bytes:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, but was written with {shard.bytes}. {again}")
        self.read_rows = min(read_rows, len(self))

    def __len__(self) -> int:
        """The number of rows in the folder."""
        return self.manifest.rows

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return int(self.manifest.settings["sequence_length"])

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary of the model that wrote the rows."""
        return int(self.manifest.settings["vocabulary"])

    @property
    def top_k(self) -> int:
        """Number of its log-probabilities stored with each position; 0 for none."""
        return int(self.manifest.settings["reference_top_k"])

    @property
    def top_k_read(self) -> int:
        """Number of log-probabilities read with each position; 0 for none."""
        return self.top_k if self.with_log_probs else 0

    @property
    def temperature(self) -> float:
        """The temperature by which logits were divided before the log-probabilities were computed."""
        return float(self.manifest.settings["divergence_temperature"])

    @property
    def order_seed(self) -> int:
        """Seed for a buffer, with which it draws the rows in the same order as a run that samples them."""
        return order_seed(int(self.manifest.settings["seed"]))

    def next_rows(self) -> ReplayRows:
        """Read the next ``read_rows`` rows; ``uses`` is how often each has been read before.

        Raises:
            ValueError: If a shard can't be read, or has changed since it was written.
        """
        parts, uses = [], []
        position, end = self.position, self.position + self.read_rows
        while position < end:
            round_, first = divmod(position, len(self))
            last = min(len(self), first + end - position)
            parts += self._read(round_, first, last)
            uses.append(torch.full((last - first,), round_, dtype=torch.int32))
            position += last - first
        if self.position <= len(self) < end:
            rank_zero_warn(
                f"Replay: all {len(self):,} rows of {self.folder} have been used and will be used again; `replay/uses` "
                "logs how often. To use each row once, generate more rows, with another seed or in another folder."
            )
        self.position = end
        return ReplayRows.cat(parts)._replace(uses=torch.cat(uses))

    def check_options(self, sampling: Sequence[str], length: int | None, cached_temperature: float | None) -> None:
        """Refuse arguments of ``SelfGeneratedReplay`` that don't fit these rows.

        Args:
            sampling: Its sampling arguments, as they should appear in the message.
            length: Its number of tokens in a row, if set.
            cached_temperature: The temperature of the log-probabilities that it needs with the rows, if any.

        Raises:
            MisconfigurationException: If there are sampling arguments, or the rows have another length, no
                log-probabilities or some of another temperature.
        """
        if sampling:
            raise MisconfigurationException(
                f"SelfGeneratedReplay has sampling arguments ({', '.join(f'`{name}`' for name in sampling)}), but with "
                f"`ReplayDataModule(buffer={str(self.folder)!r})` no rows are sampled. Remove one or the other."
            )
        if length not in (None, self.length):
            raise MisconfigurationException(
                f"`sequence_length={length}`, but the rows in {self.folder} have {self.length} tokens. Remove it, "
                f"or generate rows with `--sequence_length {length}`."
            )
        if cached_temperature is not None and not self.top_k:
            raise MisconfigurationException(
                f"`reference='cached'` reads log-probabilities stored with the rows, but those in {self.folder} have "
                "none. Generate rows with `--reference_top_k 64`, or use `reference='auto'`."
            )
        if cached_temperature not in (None, self.temperature):
            raise MisconfigurationException(
                f"`divergence_temperature={cached_temperature}`, but the log-probabilities in {self.folder} have the "
                f"temperature {self.temperature}. Set the same, or generate rows with `--divergence_temperature "
                f"{cached_temperature}`."
            )

    def check_fits(self, model: LanguageModel, idle_adapter: bool, known: bool = False) -> None:
        """Refuse rows that another model generated.

        Args:
            model: The model to train, before its first step.
            idle_adapter: Whether its adapters don't change its outputs yet, so that they are no part of the reference.
            known: Whether its weights were compared before training changed them.

        Raises:
            MisconfigurationException: If the vocabulary or the weights differ, or rows are longer than the context.
        """
        name = type(model.module).__name__
        settings = self.manifest.settings
        anew = "Generate rows with the model that you train: `lightning-replay generate`."
        if self.vocabulary != model.vocabulary:
            raise MisconfigurationException(
                f"The rows in {self.folder} come from a model with a vocabulary of {self.vocabulary}, but {name} has "
                f"{model.vocabulary}. {anew}"
            )
        # The last token of a row is only a target, never an input.
        if model.context is not None and self.length - 1 > model.context:
            raise MisconfigurationException(
                f"The rows in {self.folder} have {self.length} tokens, but {name} takes {model.context} at most. "
                f"Generate rows with `--sequence_length {model.context}` or less."
            )
        if known or not self.check_model:
            return
        own = weights_hash(model.module, adapter=not idle_adapter)
        if own != settings["model_hash"]:
            raise MisconfigurationException(
                f"The rows in {self.folder} come from a model with weights of hash {settings['model_hash'][:16]} "
                f"({self.manifest.about['model']}, in {settings['dtype']}), but {name} has {own[:16]}: it is another "
                f"model, or has been trained since, or its weights were rounded. {anew} To replay another model's rows "
                "on purpose, pass `buffer=ReplayShards(folder, check_model=False)`."
            )

    def state_dict(self) -> dict[str, Any]:
        """The position to continue reading from, and what identifies the rows and their order."""
        return {
            "position": self.position,
            "rows": self.manifest.identity,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "read_rows": self.read_rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of a saved state.

        Raises:
            MisconfigurationException: If the state is from other rows or another order.
        """
        own = self.state_dict()
        other = {key: state[key] for key in own if key != "position" and own[key] != state[key]}
        if other:
            raise MisconfigurationException(
                f"The checkpoint was saved with replay rows as {other}, but {self.folder} has "
                f"{ {key: own[key] for key in other} }. Pass the same folder and the same options of ReplayShards."
            )
        self.position = state["position"]

    def _read(self, round_: int, first: int, last: int) -> list[ReplayRows]:
        """Rows ``first`` to ``last``, exclusive, of a round."""
        numbers = torch.arange(len(self.manifest.shards))
        if self.shuffle:
            numbers = torch.randperm(len(numbers), generator=stream(self.seed, round_))
        shards = [self.manifest.shards[number] for number in numbers.tolist()]
        starts = accumulate((shard.rows for shard in shards), initial=0)
        parts = []
        for start, shard in zip(starts, shards, strict=False):
            inside = slice(max(first, start) - start, min(last, start + shard.rows) - start)
            if inside.start < inside.stop:
                parts.append(_read_shard(self.folder / shard.file, inside, self.length, self.top_k_read))
        return parts


def write_shard(path: Path, rows: ReplayRows) -> ShardFile:
    """Write rows to a Parquet file, completely or not at all; equal rows give identical files."""
    columns = token_columns(rows.tokens.to(torch.int32), rows.lengths.to(torch.int32), rows.target_tokens)
    if rows.top_ids is not None and rows.top_log_probs is not None:
        columns |= cached_columns(rows.top_ids.to(torch.int32), rows.top_log_probs.half())
    with atomic_write(path) as temporary:
        pq.write_table(
            pa.table(columns), temporary, row_group_size=_GROUP, compression="zstd", write_page_checksum=True
        )
        return ShardFile(path.name, len(rows.tokens), temporary.stat().st_size, sha256_of(temporary))


def _read_shard(path: Path, rows: slice, length: int, top_k: int) -> ReplayRows:
    """Read some rows of a shard, and only the groups that hold them."""
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            groups = range(rows.start // _GROUP, -(-rows.stop // _GROUP))
            names = ["tokens", "targets", "length", *(["top_ids", "top_log_probs"] if top_k else [])]
            table = file.read_row_groups(list(groups), columns=names)
        tokens, lengths, targets = tokens_of(table, length)
        top_ids, top_log_probs = cached_of(table, length, top_k)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{path} can't be read: {type(error).__name__}: {error}. If it is damaged, run `lightning-replay "
            "generate` again with the same settings: it replaces damaged shards."
        ) from error
    made = ReplayRows(tokens.long(), lengths.long(), targets)
    if top_k:
        made = made._replace(top_ids=top_ids.long(), top_log_probs=top_log_probs)
    start = rows.start - groups.start * _GROUP
    return made.take(torch.arange(start, start + rows.stop - rows.start))
