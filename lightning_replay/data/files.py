"""Reading documents from local files and folders and from the Hugging Face hub."""

import glob
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

__all__ = ["explained", "read_documents"]

_READERS = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
_ACCEPTED = (
    f"Files in UTF-8 with one of the suffixes {', '.join(_READERS)} are read, also compressed, with one of "
    f"{', '.join(_COMPRESSIONS)} after it"
)


def read_documents(data: str, split: str, document_separator: str | None = None) -> Dataset:
    """Documents, a row each.

    Args:
        data: A local file: ``.txt`` or ``.text`` (its documents in the column ``text``), ``.json``, ``.jsonl``,
            ``.ndjson``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow``, also compressed (``.gz``, ``.bz2``, ``.xz``,
            ``.zst``), in UTF-8 with or without a byte-order mark. Or a folder, as ``Dataset.save_to_disk`` wrote it or
            with files that ``datasets`` reads. Or the name of a dataset on the hub.
        split: The split to read of a folder or a hub dataset.
        document_separator: The text between documents in a text file. By default the file is one document.

    Raises:
        ValueError: If there is no such file or dataset, or it is empty or can't be read; with the line, if it is one.
        ModuleNotFoundError: If the file is compressed in a way that needs a package that is not installed.
    """
    path = Path(data)
    suffix, compression = _suffixes(path)
    if not path.is_dir() and (suffix in _READERS or path.is_file()):
        return _read_file(path, suffix, compression, document_separator)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(data)
        if isinstance(saved, DatasetDict) and split not in saved:
            raise ValueError(f"{data} has no split {split!r}; it has {sorted(saved)}. Set `split`.")
        return saved[split] if isinstance(saved, DatasetDict) else saved
    try:
        return load_dataset(data, split=split)
    except DatasetNotFoundError as error:
        raise ValueError(
            f"`data` is a local file, a local folder or the name of a hub dataset; got {data!r}. There is no file "
            f"{path.absolute()}, and the hub gives no dataset of that name: {error} {_ACCEPTED}."
        ) from error


@contextmanager
def explained(data: str) -> Iterator[None]:
    """Names the file, and the line if there is one, in errors about bytes that are not UTF-8, which come up late."""
    try:
        yield
    except UnicodeDecodeError as error:
        path = Path(data)
        if not path.is_file():
            raise
        raise ValueError(_fault(path, *_suffixes(path)) or f"{path} can't be read: {error}. {_ACCEPTED}.") from error


def _suffixes(path: Path) -> tuple[str, str | None]:
    """The suffix of a file's kind in lower case, and that of its compression if it has one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else None
    return suffixes[-1] if suffixes else "", compression


def _read_file(path: Path, suffix: str, compression: str | None, separator: str | None) -> Dataset:
    if not path.is_file():
        raise ValueError(f"There is no file {path.absolute()}. `data` is a local file or the name of a hub dataset.")
    if suffix not in _READERS:
        raise ValueError(f"{path} can't be read: its suffix is {path.suffix!r}. {_ACCEPTED}.")
    try:
        found = _load(path, suffix, compression)
    except ModuleNotFoundError:
        raise
    except _BROKEN as error:
        raise ValueError(f"{path} can't be read: {error}. Is it whole?") from error
    except Exception as error:  # readers raise errors of many types, few of which name the file or the line
        reason = " ".join(str(error.__cause__ or error).split())
        fault = _fault(path, suffix, compression)
        raise ValueError(fault or f"{path} can't be read as {suffix}: {reason}. {_ACCEPTED}.") from error
    if not found:
        raise ValueError(f"{path} is empty. Pass a file with at least one document.")
    if isinstance(found, Dataset):
        return found
    parts = [found] if separator is None else found.split(separator)
    texts = [part.strip() for part in parts if part.strip()]
    if not texts:
        raise ValueError(f"{path} holds white space alone. Pass a file with at least one document.")
    return Dataset.from_dict({"text": texts})


def _load(path: Path, suffix: str, compression: str | None) -> Dataset | str | None:
    """The documents of a file, or its text if it is a text file; None if the file is empty."""
    with _opened(path, compression) as file:
        if not file.read(1):
            return None
    if _READERS[suffix] == "text":
        with _opened(path, compression) as file:
            return io.IncrementalNewlineDecoder(None, translate=True).decode(
                file.read().decode("utf-8-sig"), final=True
            )
    options: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
    return load_dataset(_READERS[suffix], data_files=glob.escape(str(path)), split="train", **options)


def _opened(path: Path, compression: str | None) -> Any:
    """A file's bytes, decompressed.

    Raises:
        ModuleNotFoundError: If that needs a package that is not installed.
    """
    name = None if compression is None else _COMPRESSIONS[compression]
    try:
        return fsspec.open(str(path), "rb", compression=name).open()
    except ValueError as error:
        raise ModuleNotFoundError(
            f"{path} is compressed with {name}, which needs a package that is not installed: pip install zstandard. Or "
            "compress the file with gzip."
        ) from error


def _fault(path: Path, suffix: str, compression: str | None) -> str | None:
    """The first line of a file that is not UTF-8 or not JSON, in a message; None if there is no such line."""
    if _READERS[suffix] not in ("text", "json", "csv"):
        return None
    with _opened(path, compression) as file:
        fault = _not_utf8(file)
    if fault is not None:
        line, reason = fault
        return f"{path} is not UTF-8 in line {line}: {reason}. Save it as UTF-8. {_ACCEPTED}."
    if _READERS[suffix] != "json":
        return None
    with _opened(path, compression) as file:
        fault = _not_json(file)
    if fault is None:
        return None
    line, reason = fault
    return f"{path} is not JSON in line {line}: {reason}. A file has one object a line, or a list of objects."


def _not_utf8(file: IO[bytes]) -> tuple[int, str] | None:
    for number, line in enumerate(file, 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return number, f"byte 0x{line[error.start]:02x} at place {error.start + 1} ({error.reason})"
    return None


def _not_json(file: IO[bytes]) -> tuple[int, str] | None:
    """The first line that is not an object, unless the file as a whole is a list or an object."""
    first: tuple[int, str] | None = None
    text = file.read().decode("utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            first = number, f"{error.msg} at place {error.colno}"
            break
        if not isinstance(value, dict):
            first = number, f"a {type(value).__name__} where an object is expected"
            break
    if first is None:
        return None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        # Of a list over many lines, its own first fault; of one object a line, the line that is none.
        spread = text.lstrip().startswith("[") or not text.lstrip().split("\n", 1)[0].rstrip().endswith("}")
        return (error.lineno, f"{error.msg} at place {error.colno}") if spread else first
    items = whole if isinstance(whole, list) else [whole]
    return None if all(isinstance(item, dict) for item in items) else first
