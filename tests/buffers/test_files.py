"""A buffer in a file: whole, for other tools to read, and never trusted."""

import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from datasets import load_dataset

from lightning_replay import ReplayBuffer, ReplayRows
from lightning_replay.utilities.io import atomic_write
from tests.helpers.disk import larger_than_the_disk

KEY = "lightning_replay_buffer"
SUFFIXES = (".safetensors", ".parquet")


def used_buffer(policy: Any = "fifo", top_k: int = 3, rows: int = 5) -> ReplayBuffer:
    """A buffer in the middle of its life: ragged rows with targets, some drawn, some replaced."""
    buffer = ReplayBuffer(6, 4, policy=policy, seed=3, top_k=top_k)
    for step in (0, 7):
        lengths = torch.randint(2, 5, (rows,))
        ids, log_probs = torch.randint(50, (rows, 3, top_k)), torch.randn(rows, 3, top_k + 1).log_softmax(-1)
        cached = (ids, log_probs) if top_k else ()
        buffer.add(ReplayRows(torch.randint(50, (rows, 4)), lengths, torch.rand(rows, 4) > 0.3, *cached), step=step)
        if rows:
            buffer.draw(4)
    return buffer


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype
        if isinstance(value, torch.Tensor)
        else value == theirs[name]
        for name, value in ours.items()
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("policy", ["fifo", "reservoir"])
@pytest.mark.parametrize(("top_k", "rows"), [(3, 5), (0, 5), (0, 2), (2, 0)])
def test_a_loaded_buffer_goes_on_bit_for_bit(suffix: str, policy: Any, top_k: int, rows: int, tmp_path: Path) -> None:
    buffer = used_buffer(policy, top_k, rows)
    buffer.save(tmp_path / f"rows{suffix}")
    twin = ReplayBuffer.load(str(tmp_path / f"rows{suffix}"))
    for number in (4, 9):
        assert same(buffer.state_dict(), twin.state_dict())
        more = ReplayRows(torch.full((number, 4), number), torch.full((number,), 4))
        if top_k:
            more = more._replace(top_ids=torch.zeros(number, 3, top_k), top_log_probs=torch.zeros(number, 3, top_k + 1))
        for each in (buffer, twin):
            each.add(more)
        for ours, theirs in zip(buffer.draw(number), twin.draw(number), strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)  # type: ignore[arg-type]


def test_other_tools_read_the_rows_of_a_parquet_file(tmp_path: Path) -> None:
    buffer = ReplayBuffer(8, 4, top_k=2)
    tokens, lengths = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]]), torch.tensor([3, 4])
    targets = torch.tensor([[False, True, True, True], [True, True, False, True]])
    ids, log_probs = torch.randint(50, (2, 3, 2)), torch.randn(2, 3, 3).log_softmax(-1).half()
    buffer.add(ReplayRows(tokens, lengths, targets, ids, log_probs), step=9)
    buffer.save(tmp_path / "rows.parquet")
    rows = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path))
    assert rows["tokens"][:] == [[5, 6, 7], [8, 9, 10, 11]]
    assert rows["targets"][:] == [[False, True, True], [True, True, False, True]]
    assert (rows["length"][:], rows["uses"][:], rows["step"][:]) == ([3, 4], [0, 0], [9, 9])
    assert rows["top_ids"][:] == ids.tolist()
    assert rows["top_log_probs"][:] == log_probs.tolist()


def altered(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Change what stands in a file, which stays a proper file of its format."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            values, parts = json.loads(file.metadata()[KEY]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        change(values, parts)
        safetensors.torch.save_file(parts, path, {KEY: json.dumps(values)})
    else:
        table = pq.read_table(path)
        values = json.loads(table.schema.metadata[KEY.encode()])
        parts = {name: table[name] for name in table.column_names}
        change(values, parts)
        pq.write_table(pa.table(parts).replace_schema_metadata({KEY: json.dumps(values)}), path)


def put(**values: Any) -> Callable[..., None]:
    return lambda numbers, _: numbers.update(values)


ALTERED: dict[str, tuple[str, Callable[..., Any], str]] = {
    "a later format": (".safetensors", put(format=3), "has format 3; this version"),
    "no capacity": (".safetensors", lambda numbers, _: numbers.pop("capacity"), "`capacity` is None"),
    "a fraction of a row": (".safetensors", put(capacity=6.5), "`capacity` is 6.5"),
    "another policy": (".safetensors", put(policy="lifo"), "`policy` is 'lifo'"),
    "more rows than it has": (".safetensors", put(capacity=10, seen=10), r"not torch.int32 of shape \(10,\)"),
    "rows past its capacity": (".safetensors", put(capacity=4), r"of shape \(6,\), not torch.int32 of shape \(4,\)"),
    "a capacity past all memory": (".safetensors", put(capacity=2**50, seen=6), "no memory for its"),
    "a count that overflows": (".safetensors", put(seen=2**80), "`seen` is"),
    "wider tokens": (".safetensors", put(length=3), r"`tokens` is torch.int32 of shape \(6, 4\)"),
    "no tokens": (".safetensors", lambda _, parts: parts.pop("tokens"), "it has no rows"),
    "no generator": (".safetensors", lambda _, parts: parts.pop("generator"), "`generator` is NoneType"),
    "tokens of 64 bits": (
        ".safetensors",
        lambda _, parts: parts.update(tokens=parts["tokens"].long()),
        r"`tokens` is torch.int64",
    ),
    "negative lengths": (".safetensors", lambda _, parts: parts["lengths"].sub_(9), "`lengths` ranges from -"),
    "lengths past the row": (".safetensors", lambda _, parts: parts["lengths"].add_(9), "not 1 to 4"),
    "negative uses": (".safetensors", lambda _, parts: parts["uses"].sub_(9), "`uses` ranges from -"),
    "a slot that isn't there": (".safetensors", lambda _, parts: parts["deck"].add_(9), "`deck` ranges from"),
    "a slot twice": (
        ".safetensors",
        lambda _, parts: parts.update(deck=torch.tensor([1, 1])),
        "`deck` holds a slot twice",
    ),
    "negative cached ids": (".safetensors", lambda _, parts: parts["top_ids"].sub_(99), "`top_ids` ranges from -"),
    "positive log-probabilities": (
        ".safetensors",
        lambda _, parts: parts["top_log_probs"].fill_(2),
        "`top_log_probs` ranges from 2.0 to 2.0",
    ),
    "NaN log-probabilities": (
        ".safetensors",
        lambda _, parts: parts["top_log_probs"].fill_(float("nan")),
        "`top_log_probs` ranges from nan",
    ),
    "a generator's state cut short": (
        ".safetensors",
        lambda _, parts: parts.update(generator=parts["generator"][:-8].clone()),
        "`generator` is no state of a random generator",
    ),
    "a generator's state of zeros": (
        ".safetensors",
        lambda _, parts: parts["generator"].zero_(),
        "`generator` is no state of a random generator",
    ),
    "a column gone": (".parquet", lambda _, parts: parts.pop("uses"), "not a complete file of a replay buffer.*uses"),
    "rows shorter than they say": (
        ".parquet",
        lambda _, parts: parts.update(length=pa.array([1] * 6, pa.int32())),
        "`length` is not the number of `tokens` in each row",
    ),
    "a row that is null": (
        ".parquet",
        lambda _, parts: parts.update(uses=pa.array([None] * 6, pa.int32())),
        "`uses` is torch.float64",
    ),
    "tokens that are text": (
        ".parquet",
        lambda _, parts: parts.update(tokens=pa.array([["a", "b"]] * 6)),
        "not a complete file of a replay buffer",
    ),
    "tokens that are no lists": (
        ".parquet",
        lambda _, parts: parts.update(tokens=pa.array([5] * 6, pa.int32())),
        "not a complete file of a replay buffer",
    ),
    "negative tokens": (
        ".parquet",
        lambda _, parts: parts.update(
            tokens=pa.array([[-7] * len(row) for row in parts["tokens"].to_pylist()], pa.list_(pa.int32()))
        ),
        "`tokens` holds -7",
    ),
    "a length past all bounds": (".parquet", put(length=float("inf")), "not a complete file of a replay buffer"),
    "a row without end": (
        ".parquet",
        lambda _, parts: parts.update(tokens=pa.array([[7] * 100_000] * 6, pa.list_(pa.int32()))),
        "a column holds 600000 values, more than its rows have",
    ),
    "a slot not there": (".parquet", put(deck=[99]), "`deck` ranges from 99 to 99, not 0 to 5"),
    "a generator of another kind": (".parquet", put(generator="AAAA"), "`generator` is no state"),
    "more columns than its kind": (".parquet", put(top_k=0), "a column holds 36|more than its rows"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_file_is_refused(name: str, tmp_path: Path) -> None:
    suffix, change, message = ALTERED[name]
    path = tmp_path / f"rows{suffix}"
    used_buffer().save(path)
    ReplayBuffer.load(path)
    altered(path, change)
    with pytest.raises(ValueError, match=message) as refused:
        ReplayBuffer.load(path)
    assert path.name in str(refused.value)


def test_an_altered_checkpoint_is_refused_and_changes_nothing() -> None:
    buffer = used_buffer()
    state, before = buffer.state_dict(), buffer.state_dict()
    for change in (
        {"deck": torch.tensor([99])},
        {"lengths": state["lengths"] * 0},
        {"generator": torch.zeros(8, dtype=torch.uint8)},
        {"tokens": state["tokens"].to("meta")},
        {"uses": [1] * 6},
    ):
        with pytest.raises(ValueError, match="is damaged or was altered"):
            buffer.load_state_dict(state | change)
        assert same(buffer.state_dict(), before)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_such_file_is_refused_and_never_unpickled(suffix: str, tmp_path: Path) -> None:
    path, marker = tmp_path / f"rows{suffix}", tmp_path / "executed"
    used_buffer().save(path)
    whole = path.read_bytes()
    torch.save({"buffer": Evil(marker)}, tmp_path / "evil.pt")
    contents = {
        "pickled": pickle.dumps(Evil(marker)),
        "a checkpoint": (tmp_path / "evil.pt").read_bytes(),
        "empty": b"",
        "truncated": whole[:-7],
        "cut in half": whole[: len(whole) // 2],
        "longer than it says": whole + b"more",
        "with a header longer than the file": struct.pack("<Q", 10**15) + whole[8:],
        "text": b"rows of tokens",
        "another's": None,
    }
    for kind, content in contents.items():
        if content is not None:
            path.write_bytes(content)
        elif suffix == ".parquet":
            pq.write_table(pa.table({"tokens": [[1, 2]]}), path)
        else:
            safetensors.torch.save_file({"tokens": torch.zeros(1, 2)}, path)
        with pytest.raises(ValueError, match="is not a complete file of a replay buffer"):
            ReplayBuffer.load(path)
            pytest.fail(kind)
        assert not marker.exists()
    pickle.loads(contents["pickled"])  # type: ignore[arg-type]  # the pickle does what it threatens
    assert marker.exists()


def test_a_file_of_another_kind_or_none_is_told(tmp_path: Path) -> None:
    for call in (used_buffer().save, ReplayBuffer.load):
        with pytest.raises(ValueError, match=r"ends in '.safetensors' or '.parquet'; got .*rows.pt"):
            call(tmp_path / "rows.pt")
    with pytest.raises(FileNotFoundError, match="There is no file .*rows.parquet to load"):
        ReplayBuffer.load(tmp_path / "rows.parquet")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 64 kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_else(suffix: str, full_disk: Path) -> None:
    path, old = full_disk / f"rows{suffix}", used_buffer()
    old.save(path)
    with pytest.raises(OSError, match="No space left on device"):
        larger_than_the_disk().save(path)
    assert [file.name for file in full_disk.iterdir()] == [path.name]
    assert same(ReplayBuffer.load(path).state_dict(), old.state_dict())


SAVE_PAST_THE_LIMIT = """
import resource, sys
from tests.helpers.disk import larger_than_the_disk
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
larger_than_the_disk().save(sys.argv[1])
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of a file's size to set")
def test_a_file_that_may_grow_no_further_keeps_the_old_one(suffix: str, tmp_path: Path) -> None:
    path, old = tmp_path / f"rows{suffix}", used_buffer()
    old.save(path)
    command = [sys.executable, "-c", SAVE_PAST_THE_LIMIT, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "OSError" in run.stderr
    assert "File too large" in run.stderr
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert same(ReplayBuffer.load(path).state_dict(), old.state_dict())


def test_a_write_that_is_interrupted_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        assert temporary.name == path.name
        assert temporary.is_relative_to(tmp_path)
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


IS_KILLED = """
import os, sys
from lightning_replay.utilities.io import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed_once_it_is_a_day_old(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IS_KILLED, str(tmp_path / "rows.txt")]
    for _ in range(2):
        assert subprocess.run(command, check=False).returncode != 0
    old, young = tmp_path.iterdir()
    now = time.time()
    os.utime(old, (now, now - 25 * 3600))
    os.utime(young, (now, now - 23 * 3600))
    used_buffer().save(tmp_path / "other.safetensors")
    assert {file.name for file in tmp_path.iterdir()} == {young.name, "other.safetensors"}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no permissions of groups")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_can_be_read_by_whom_other_new_files_can(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    before = os.umask(0o027)
    try:
        used_buffer().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
