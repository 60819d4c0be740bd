"""Reading what experiment trackers leave on the disk: Weights & Biases (`.wandb` files), MLflow (files or SQLite)."""

import json
import math
import sqlite3
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml

__all__ = [
    "MLFLOW",
    "MLFLOW_DATABASE",
    "WANDB",
    "Tracked",
    "is_mlflow_database",
    "is_mlflow_run",
    "read_mlflow",
    "read_mlflow_database",
    "read_wandb",
    "unfenced",
]

WANDB, MLFLOW = "run-*.wandb", "meta.yaml"
"""Names of the files that mark a run's folder."""
MLFLOW_DATABASE = "*.db"
"""Names of the files that may hold MLflow's runs; by default it is ``mlflow.db``."""
_SAMPLES, _VERDICT = "replay/samples", "replay/verdict"


class Tracked(NamedTuple):
    """What a tracker kept of a run.

    Attributes:
        title: The name that the user or the tracker gave the run; empty if there is none.
        values: The value at each step, by key.
        samples: The previews of each refill, by step.
        verdicts: How each fit with a budget ended, by step.
        is_whole: Whether the log ends after a whole record.
    """

    title: str
    values: dict[str, dict[int, float]]
    samples: dict[int, list[str]]
    verdicts: dict[int, list[str]]
    is_whole: bool


def unfenced(markdown: str) -> list[str]:
    """The samples, which ``SelfGeneratedReplay`` logs between Markdown fences."""
    return markdown.removeprefix("```\n").removesuffix("\n```").split("\n```\n\n```\n")


def read_wandb(folder: Path) -> Tracked:
    """Read a run of Weights & Biases, offline or not, from its folder.

    Raises:
        ModuleNotFoundError: If ``wandb``, which defines the messages in its files, is not installed.
    """
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{folder} holds a run of Weights & Biases, and wandb, which reads it, is not installed: pip install wandb"
        ) from error
    tracked = Tracked("", {}, {}, {}, True)
    for file in sorted(folder.glob(WANDB)):
        for message in _wandb_records(file.read_bytes()):
            if message is None:
                tracked = tracked._replace(is_whole=False)
                break
            record = Record.FromString(message)
            if record.WhichOneof("record_type") == "run":
                tracked = tracked._replace(title=record.run.display_name)
            row = {tuple(item.nested_key) or (item.key,): item.value_json for item in record.history.item}
            if ("trainer/global_step",) in row:
                _add_wandb_row(tracked, row, folder / "files")
    return tracked


def _add_wandb_row(tracked: Tracked, row: dict[tuple[str, ...], str], files: Path) -> None:
    """Add a row that Lightning's logger wrote; it has the step beside the values."""
    step = int(json.loads(row["trainer/global_step",]))
    for (key, *inner), text in row.items():
        value = json.loads(text)
        if key in (_SAMPLES, _VERDICT) and inner == ["path"]:
            table = files / value
            if table.is_file():
                texts = tracked.samples if key == _SAMPLES else tracked.verdicts
                texts[step] = [str(cells[0]) for cells in json.loads(table.read_text("utf-8"))["data"]]
        elif not inner and not key.startswith("_") and key not in ("epoch", "trainer/global_step"):
            number = _number(value)
            if number is not None:
                tracked.values.setdefault(key, {})[step] = number


def _number(value: Any) -> float | None:
    """A logged number; what isn't finite is in the file as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _wandb_records(content: bytes) -> Iterator[bytes | None]:
    """The messages of a file, which is a log in LevelDB's format; None at the end if the last is cut off.

    Blocks of 32 KiB hold parts of messages; each part has a header of its checksum, its length and which part it is.
    https://github.com/google/leveldb/blob/main/doc/log_format.md. The first header is W&B's own, of the same size.
    """
    block, header, message = 32768, struct.Struct("<IHB"), b""
    whole, last = 1, 4
    place = header.size
    while place + header.size <= len(content):
        left = block - place % block
        if left < header.size:
            place += left
            continue
        _, length, part = header.unpack_from(content, place)
        place += header.size
        if place + length > len(content):
            yield None
            return
        message += content[place : place + length]
        place += length
        if part in (whole, last):
            yield message
            message = b""


def is_mlflow_run(folder: Path) -> bool:
    """Whether a folder with a ``meta.yaml`` is a run's; experiments and logged models have one, too."""
    return "run_id" in _mlflow_meta(folder) and "model_id" not in _mlflow_meta(folder)


def _mlflow_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = yaml.safe_load((folder / MLFLOW).read_text("utf-8", errors="replace"))
    except yaml.YAMLError:  # another program's file of that name
        return {}
    return meta if isinstance(meta, dict) else {}


def read_mlflow(folder: Path) -> Tracked:
    """Read a run from its folder in MLflow's file store: a file for each key, with a line for each value.

    MLflow's own client is not used: recent releases refuse to open a file store unless an environment variable is set.
    """
    tracked = Tracked(str(_mlflow_meta(folder).get("run_name") or ""), {}, {}, {}, True)
    metrics = folder / "metrics"
    for path in sorted(metrics.rglob("*")):
        if not path.is_file():
            continue
        *lines, rest = path.read_text("utf-8").split("\n")
        if rest:
            tracked = tracked._replace(is_whole=False)
        rows = [line.split(" ") for line in lines]  # time, value, step
        series = {int(step): float(value) for _, value, step, *_ in rows}
        if series:
            tracked.values[path.relative_to(metrics).as_posix()] = series
    _add_mlflow_texts(tracked, folder / "artifacts")
    return tracked


def _add_mlflow_texts(tracked: Tracked, artifacts: Path) -> None:
    for key, texts in {_SAMPLES: tracked.samples, _VERDICT: tracked.verdicts}.items():
        for path in sorted((artifacts / key).glob("step-*.md")):
            texts[int(path.stem.removeprefix("step-"))] = unfenced(path.read_text("utf-8"))


def is_mlflow_database(path: Path) -> bool:
    """Whether a path is the SQLite database in which MLflow keeps runs."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            return False
    with closing(_opened(path)) as database:
        try:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        except sqlite3.DatabaseError:
            return False
    return {"runs", "metrics", "alembic_version"} <= tables


def read_mlflow_database(path: Path) -> dict[str, Tracked]:
    """Read the runs, by their ids, in MLflow's SQLite database; those that were deleted are left out.

    MLflow's own client is not used: it brings a database toolkit, and changes the tables of older releases.
    """
    runs: dict[str, Tracked] = {}
    with closing(_opened(path)) as database:
        for run, name, artifacts in database.execute(
            "SELECT run_uuid, name, artifact_uri FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time"
        ):
            runs[run] = Tracked(name or "", {}, {}, {}, True)
            uri = urlsplit(artifacts or "")
            if uri.scheme in ("", "file") and uri.path:
                _add_mlflow_texts(runs[run], path.parent / url2pathname(uri.path))
        rows = database.execute("SELECT run_uuid, key, step, value, is_nan FROM metrics ORDER BY step, timestamp")
        for run, key, step, value, is_nan in rows:
            if run in runs:
                infinite = abs(value) == sys.float_info.max  # which no column can hold
                number = math.nan if is_nan else math.copysign(math.inf, value) if infinite else value
                runs[run].values.setdefault(key, {})[step] = number
    return runs


def _opened(path: Path) -> sqlite3.Connection:
    """A database, to read."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
