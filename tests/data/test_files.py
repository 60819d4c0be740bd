"""Documents in files: every kind that is accepted, and for every other the file, the line and what is accepted."""

import bz2
import gzip
import importlib
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lightning_replay.data.files import explained, read_documents

ROWS = [{"text": "one two", "n": 1}, {"text": "café", "n": 2}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
CSV = "text,n\none two,1\ncafé,2\n"
CONTENTS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.json": json.dumps(ROWS, indent=1),
    "lines.json": LINES,
    "A.JSONL": LINES,
    "a.csv": CSV,
    "a.tsv": CSV.replace(",", "\t"),
    "a[1].csv": CSV,
}
COMPRESS: dict[str, Any] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte-order mark"])
@pytest.mark.parametrize("name", CONTENTS)
def test_each_kind_of_file_is_read(name: str, mark: str, tmp_path: Path) -> None:
    assert list(read_documents(written(tmp_path, name, mark + CONTENTS[name]), "train")) == ROWS


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".GZ"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_compressed_files_are_read(name: str, ending: str, tmp_path: Path) -> None:
    content = "\ufeffone two" if name == "a.txt" else CONTENTS[name]
    path = written(tmp_path, name + ending, COMPRESS[ending.lower()](content.encode()))
    assert read_documents(path, "train")[0]["text"] == "one two"


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.text"])
def test_a_text_file_is_read_without_its_mark_and_with_plain_line_breaks(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, "\ufeffone\r\ntwo\r<end>\ufeff three ")
    assert read_documents(path, "train")["text"][:] == ["one\ntwo\n<end>\ufeff three"]
    assert read_documents(path, "train", "<end>")["text"][:] == ["one\ntwo", "\ufeff three"]


def test_files_and_folders_of_datasets_are_read(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "A.Parquet")
    dataset.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(str(tmp_path / "parts"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "A.Parquet", tmp_path / "saved", arrow, tmp_path / "parts"):
        assert list(read_documents(str(path), "train")) == ROWS
    assert list(read_documents(str(tmp_path / "parts"), "test")) == ROWS[1:]
    with pytest.raises(ValueError, match=r"parts has no split 'dev'; it has \['test', 'train'\]"):
        read_documents(str(tmp_path / "parts"), "dev")


LATIN = "one\ncafé\n".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "a.csv.gz is empty"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"\xef\xbb\xbf \n\n", "a.txt holds white space alone"),
        ("a.txt", LATIN, r"a.txt is not UTF-8 in line 2: byte 0xe9 at place 4 .*Save it as UTF-8. .*\.csv, .*\.gz"),
        ("a.txt.gz", gzip.compress(LATIN, mtime=0), "a.txt.gz is not UTF-8 in line 2"),
        ("a.csv", LATIN, "a.csv is not UTF-8 in line 2"),
        ("a.jsonl", LINES.encode("utf-16"), "a.jsonl is not UTF-8 in line 1: byte 0xff at place 1"),
        ("a.jsonl", LINES + '{"text": \n', "a.jsonl is not JSON in line 3: Expecting value at place 10"),
        ("a.jsonl.gz", gzip.compress((LINES + "oops").encode(), mtime=0), "a.jsonl.gz is not JSON in line 3"),
        ("a.jsonl", LINES + '"text"\n', "a.jsonl is not JSON in line 3: a str where an object is expected"),
        ("a.json", '[\n{"text": "one"},\n{"text" "two"}\n]', "a.json is not JSON in line 3: Expecting ':'"),
        ("a.csv", "text,n\none,1\ntwo,2,3\n", "a.csv can't be read as .csv: .*line 3, saw 3"),
        ("a.parquet", b"text", "a.parquet can't be read as .parquet"),
        ("a.jsonl.gz", LINES, "a.jsonl.gz can't be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "a.jsonl.gz can't be read: .*Is it whole?"),
        ("a.docx", b"PK", r"a.docx can't be read: its suffix is '.docx'. Files in UTF-8 .*\.jsonl"),
        ("README", b"text", "README can't be read: its suffix is ''"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_documents(written(tmp_path, name, content), "train")


def test_bytes_that_a_reader_lets_pass_are_named_when_they_come_up(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="a.jsonl is not UTF-8 in line 2"), explained(path):
        print(read_documents(path, "train")[1])


def test_a_compression_without_its_package_names_it(tmp_path: Path) -> None:
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match="a.jsonl.zst is compressed with zstd.*pip install zstandard"):
            read_documents(written(tmp_path, "a.jsonl.zst", b"\x28\xb5\x2f\xfd"), "train")
    else:
        path = written(tmp_path, "a.jsonl.zst", zstandard.ZstdCompressor().compress(LINES.encode()))
        assert list(read_documents(path, "train")) == ROWS
