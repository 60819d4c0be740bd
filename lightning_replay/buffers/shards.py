"""Replay rows in a folder: Parquet shards with a manifest, written once and read as they are needed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_replay.buffers.files import cached_columns, cached_of, token_columns, tokens_of
from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.models.language_model import LanguageModel, weights_hash
from lightning_replay.utilities.io import atomic_write
from lightning_replay.utilities.seeds import order_seed, stream
from lightning_replay.utilities.validation import is_whole

__all__ = ["Manifest", "ReplayShards", "ShardFile", "shard_name", "write_shard"]

_NAME = "manifest.json"
_FORMAT, _VERSION = "lightning-replay rows", 1
_GROUP = 64
"""Rows that are compressed together, and read together at least."""


@dataclass(frozen=True)
class ShardFile:
    """What the manifest says of a shard.

    Attributes:
        file: Its name in the folder.
        rows: How many rows it holds.
        bytes: Its size.
        sha256: The hash of its bytes.
    """

    file: str
    rows: int
    bytes: int
    sha256: str

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is there as it was written; all of it is read."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.bytes and _sha256(path) == self.sha256


@dataclass
class Manifest:
    """What a folder of rows holds, and how it was made.

    Attributes:
        settings: All that the rows depend on.
        about: What else is good to know of them.
        shards: Those that are finished, by number.
    """

    settings: dict[str, Any]
    about: dict[str, Any]
    shards: dict[int, ShardFile]

    @property
    def planned(self) -> int:
        """How many shards there will be."""
        return -(-int(self.settings["rows"]) // int(self.settings["shard_rows"]))

    @property
    def rows(self) -> int:
        """How many rows the finished shards hold."""
        return sum(shard.rows for shard in self.shards.values())

    @property
    def missing(self) -> list[int]:
        """The numbers of those that are not finished."""
        return [number for number in range(self.planned) if number not in self.shards]

    @property
    def identity(self) -> str:
        """A hash of all rows; the same wherever the folder is."""
        hashes = [self.shards[number].sha256 for number in sorted(self.shards)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """That of a folder.

        Raises:
            FileNotFoundError: If it has none.
            ValueError: If it is something else, or of a later version.
        """
        path = folder / _NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {_NAME} in {folder.absolute()}. Rows are written there by `lightning-replay generate "
                f"--model M --rows N --output {folder}`."
            )
        try:
            said = json.loads(path.read_text())
            if said["format"] != _FORMAT or said["version"] != _VERSION:
                raise ValueError(
                    f"its format is {said['format']!r}, version {said['version']!r}, and {_FORMAT!r}, version "
                    f"{_VERSION}, is read here"
                )
            shards = {int(number): ShardFile(**shard) for number, shard in said["shards"].items()}
            return cls(dict(said["settings"]), dict(said["about"]), shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # JSON can be anything
            raise ValueError(
                f"{path} is not the manifest of a folder of rows: {type(error).__name__}: {error}."
            ) from error

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        shards = {str(number): asdict(self.shards[number]) for number in sorted(self.shards)}
        said = {"format": _FORMAT, "version": _VERSION, "about": self.about, "settings": self.settings}
        with atomic_write(folder / _NAME) as temporary:
            temporary.write_text(json.dumps(said | {"shards": shards}, indent=1) + "\n")


class ReplayShards:
    """Replay rows that ``lightning-replay generate`` wrote to a folder.

    They are read from the disk a few at a time, in order; after the last comes the first again. Nothing but those few
    is held in memory. Each of several processes reads the folder, which all of them have to see under this path.

    Args:
        folder: Where the rows are.
        shuffle: Whether shards come in random order, another one in each round.
        seed: Seed of that order.
        read_rows: How many rows are read at a time. Among these, rows are drawn in random order.
        check_model: Whether rows of another model than the one that is trained are refused. Without, the reference is
            whatever model wrote them.

    Attributes:
        manifest: What the folder holds.
        position: How many rows have been read so far, in all rounds.
        with_log_probs: Whether the log-probabilities kept with the rows are read as well.

    Raises:
        FileNotFoundError: If the folder has no manifest, or lacks a shard.
        ValueError: If an argument is out of its range, the rows are not all written yet, or a shard is not as it was
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
        again = "Run `lightning-replay generate` again with the same settings: it writes what is missing."
        if self.manifest.missing:
            raise ValueError(
                f"{folder} is not finished: {len(self.manifest.missing)} of {self.manifest.planned} shards are "
                f"missing. {again}"
            )
        for shard in self.manifest.shards.values():
            path = self.folder / shard.file
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though the manifest names it. {again}")
            if path.stat().st_size != shard.bytes:
                raise ValueError(f"{path} has {path.stat().st_size} bytes and was written with {shard.bytes}. {again}")
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
        """How many of its log-probabilities are kept with each position; 0 for none."""
        return int(self.manifest.settings["reference_top_k"])

    @property
    def top_k_read(self) -> int:
        """How many of them are read; 0 for none."""
        return self.top_k if self.with_log_probs else 0

    @property
    def temperature(self) -> float:
        """What the logits were divided by before these were taken."""
        return float(self.manifest.settings["divergence_temperature"])

    @property
    def order_seed(self) -> int:
        """Seed of a buffer that draws the rows in the order in which a run that samples them would."""
        return order_seed(int(self.manifest.settings["seed"]))

    def next_rows(self) -> ReplayRows:
        """Read the next ``read_rows`` rows; their ``uses`` say how often each has been read before.

        Raises:
            ValueError: If a shard can't be read, or is not as it was written.
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
                f"Replay: all {len(self):,} rows of {self.folder} have been used, and from here on they are used "
                "again; `replay/uses` counts. Generate more rows, with another seed or in another folder, to use each "
                "once."
            )
        self.position = end
        return ReplayRows.cat(parts)._replace(uses=torch.cat(uses))

    def check_options(self, sampling: Sequence[str], length: int | None, cached_temperature: float | None) -> None:
        """Refuse what ``SelfGeneratedReplay`` was told and these rows can't give.

        Args:
            sampling: Options that it was given and that are about sampling.
            length: Tokens that a row is to have, where it was told.
            cached_temperature: The temperature of the log-probabilities that it wants to find beside the rows, if any.

        Raises:
            MisconfigurationException: With what to do.
        """
        if sampling:
            raise MisconfigurationException(
                f"SelfGeneratedReplay was told how to sample ({', '.join(f'`{name}`' for name in sampling)}), and with "
                f"`ReplayDataModule(buffer={str(self.folder)!r})` nothing is sampled. Leave out one of them."
            )
        if length not in (None, self.length):
            raise MisconfigurationException(
                f"`sequence_length={length}`, but the rows in {self.folder} have {self.length} tokens. Leave it out, "
                f"or generate rows with `--sequence-length {length}`."
            )
        if cached_temperature is not None and not self.top_k:
            raise MisconfigurationException(
                f"`reference='cached'` takes log-probabilities from beside the rows, but those in {self.folder} have "
                "none. Generate rows with `--reference-top-k 64`, or use `reference='auto'`."
            )
        if cached_temperature not in (None, self.temperature):
            raise MisconfigurationException(
                f"`divergence_temperature={cached_temperature}`, but the log-probabilities in {self.folder} were taken "
                f"at {self.temperature}. Set the same, or generate rows with `--divergence-temperature "
                f"{cached_temperature}`."
            )

    def check_fits(self, model: LanguageModel, idle_adapter: bool, known: bool = False) -> None:
        """Refuse rows that are not those of a model.

        Args:
            model: The model that trains, before its first step.
            idle_adapter: Whether its adapters change nothing yet, so that they are no part of the reference.
            known: Whether its weights have been compared before they began to change.

        Raises:
            MisconfigurationException: If vocabulary, context or weights are others.
        """
        name = type(model.module).__name__
        settings = self.manifest.settings
        anew = "Generate rows with the model that you train: `lightning-replay generate`."
        if self.vocabulary != model.vocabulary:
            raise MisconfigurationException(
                f"The rows in {self.folder} come from a model with a vocabulary of {self.vocabulary}, but {name} has "
                f"{model.vocabulary}. {anew}"
            )
        # The last token of a row is a target and no more.
        if model.context is not None and self.length - 1 > model.context:
            raise MisconfigurationException(
                f"The rows in {self.folder} have {self.length} tokens, but {name} takes {model.context} at most. "
                f"Generate rows with `--sequence-length {model.context}` or less."
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
        """How far reading has come."""
        return {
            "position": self.position,
            "rows": self.manifest.identity,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "read_rows": self.read_rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            MisconfigurationException: If the state is that of other rows or of another order.
        """
        own = self.state_dict()
        other = {key: state[key] for key in own if key != "position" and own[key] != state[key]}
        if other:
            raise MisconfigurationException(
                f"The checkpoint goes on with replay rows as {other}, and {self.folder} has "
                f"{ {key: own[key] for key in other} }. Pass the same folder and the same options of ReplayShards."
            )
        self.position = state["position"]

    def _read(self, round_: int, first: int, last: int) -> list[ReplayRows]:
        """Rows of a round, from the first up to the last, which is not included."""
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


def shard_name(number: int, planned: int) -> str:
    """The name of a shard's file.

    Example:
        >>> shard_name(3, 40)
        'rows-00003-of-00040.parquet'
    """
    return f"rows-{number:05d}-of-{planned:05d}.parquet"


def write_shard(path: Path, rows: ReplayRows) -> ShardFile:
    """Write rows to a Parquet file, whole or not at all; equal rows make equal files."""
    targets = rows.mask if rows.targets is None else rows.mask & rows.targets
    columns = token_columns(rows.tokens.to(torch.int32), rows.lengths.to(torch.int32), targets)
    if rows.top_ids is not None and rows.top_log_probs is not None:
        columns |= cached_columns(rows.top_ids.to(torch.int32), rows.top_log_probs.half())
    with atomic_write(path) as temporary:
        pq.write_table(
            pa.table(columns), temporary, row_group_size=_GROUP, compression="zstd", write_page_checksum=True
        )
        return ShardFile(path.name, len(rows.tokens), temporary.stat().st_size, _sha256(temporary))


def _read_shard(path: Path, rows: slice, length: int, top_k: int) -> ReplayRows:
    """Some rows of a shard; no others than those compressed together with them are read."""
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            groups = range(rows.start // _GROUP, -(-rows.stop // _GROUP))
            names = ["tokens", "targets", "length", *(["top_ids", "top_log_probs"] if top_k else [])]
            table = file.read_row_groups(list(groups), columns=names)
        tokens, lengths, targets = tokens_of(table, length)
        top_ids, top_log_probs = cached_of(table, length, top_k)
    except Exception as error:  # a file can be wrong in any way
        raise ValueError(
            f"{path} can't be read: {type(error).__name__}: {error}. If it was damaged, run `lightning-replay "
            "generate` again with the same settings: it writes damaged shards anew."
        ) from error
    made = ReplayRows(tokens.long(), lengths.long(), targets)
    if top_k:
        made = made._replace(top_ids=top_ids.long(), top_log_probs=top_log_probs)
    start = rows.start - groups.start * _GROUP
    return made.take(torch.arange(start, start + rows.stop - rows.start))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while some := file.read(2**20):
            digest.update(some)
    return digest.hexdigest()
