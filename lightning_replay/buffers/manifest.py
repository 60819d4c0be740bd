"""The manifest of a folder of replay rows: what its shards hold and how they were made."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_replay.utilities.io import atomic_write

__all__ = ["Manifest", "ShardFile", "sha256_of", "shard_name"]

_NAME = "manifest.json"
_FORMAT, _VERSION = "lightning-replay rows", 1


@dataclass(frozen=True)
class ShardFile:
    """A shard as recorded in the manifest.

    Attributes:
        file: Its name in the folder.
        rows: Number of rows in it.
        bytes: Its size in bytes.
        sha256: The hash of its bytes.
    """

    file: str
    rows: int
    bytes: int
    sha256: str

    def is_whole(self, folder: Path) -> bool:
        """Whether the file exists and is unchanged since it was written; this reads all of it."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.bytes and sha256_of(path) == self.sha256


@dataclass
class Manifest:
    """What a folder of rows holds, and how it was made.

    Attributes:
        settings: Everything that the rows depend on.
        about: Other facts about them, such as the model's name.
        shards: The finished shards, by number.
    """

    settings: dict[str, Any]
    about: dict[str, Any]
    shards: dict[int, ShardFile]

    @property
    def planned(self) -> int:
        """Number of shards that the finished folder has."""
        return -(-int(self.settings["rows"]) // int(self.settings["shard_rows"]))

    @property
    def rows(self) -> int:
        """Number of rows in the finished shards."""
        return sum(shard.rows for shard in self.shards.values())

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not finished."""
        return [number for number in range(self.planned) if number not in self.shards]

    @property
    def identity(self) -> str:
        """A hash of all rows, independent of the folder's path."""
        hashes = [self.shards[number].sha256 for number in sorted(self.shards)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder.

        Raises:
            FileNotFoundError: If the folder has none.
            ValueError: If the file is not a manifest, or is from a later version.
        """
        path = folder / _NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {_NAME} in {folder.absolute()}. To write rows there, run `lightning-replay generate "
                f"--model M --rows N --output {folder}`."
            )
        try:
            content = json.loads(path.read_text())
            if content["format"] != _FORMAT or content["version"] != _VERSION:
                raise ValueError(
                    f"its format is {content['format']!r}, version {content['version']!r}; this version of "
                    f"lightning-replay reads {_FORMAT!r}, version {_VERSION}"
                )
            shards = {int(number): ShardFile(**shard) for number, shard in content["shards"].items()}
            return cls(dict(content["settings"]), dict(content["about"]), shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # JSON can be anything
            raise ValueError(
                f"{path} is not the manifest of a folder of rows: {type(error).__name__}: {error}."
            ) from error

    def write(self, folder: Path) -> None:
        """Write the manifest to a folder, completely or not at all."""
        shards = {str(number): asdict(self.shards[number]) for number in sorted(self.shards)}
        content = {"format": _FORMAT, "version": _VERSION, "about": self.about, "settings": self.settings}
        with atomic_write(folder / _NAME) as temporary:
            temporary.write_text(json.dumps(content | {"shards": shards}, indent=1) + "\n")


def shard_name(number: int, planned: int) -> str:
    """The name of a shard's file.

    Example:
        >>> shard_name(3, 40)
        'rows-00003-of-00040.parquet'
    """
    return f"rows-{number:05d}-of-{planned:05d}.parquet"


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while some := file.read(2**20):
            digest.update(some)
    return digest.hexdigest()
