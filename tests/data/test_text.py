import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_replay import TextDataModule

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog"]
DOCUMENTS = ["the cat sat on the mat", "a dog saw the cat", "the dog and the cat sat"] * 8


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def written(folder: Path, kind: str) -> Path:
    path = folder / f"documents.{kind}"
    if kind == "txt":
        path.write_text("<end>".join(DOCUMENTS))
    elif kind == "parquet":
        Dataset.from_dict({"text": DOCUMENTS}).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    return path


def stream(tokenizer: Any) -> list[int]:
    """The documents' tokens by hand, one word at a time."""
    words = [["<s>", *document.split(), "</s>"] for document in DOCUMENTS]
    return [tokenizer.convert_tokens_to_ids(word) for word in chain.from_iterable(words)]


def rows_of(data: TextDataModule) -> torch.Tensor:
    loaders = [data.train_dataloader(), data.val_dataloader()]
    return torch.cat([batch["input_ids"] for loader in loaders for batch in loader])


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_local_files_are_packed_without_losing_a_token(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    data = TextDataModule(written(tmp_path, kind), tokenizer, 16, batch_size=3, document_separator="<end>")
    data.prepare_data()
    data.setup("fit")
    expected = stream(tokenizer)
    packed = [expected[i : i + 16] for i in range(0, len(expected) - 15, 16)]
    assert sorted(rows_of(data).tolist()) == sorted(packed)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_of_many_documents_one_tail_is_dropped(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    # `datasets` hands over 1,000 documents at a time.
    count, length = 2_501, 7
    path = tmp_path / f"many.{kind}"
    document = "the cat sat"
    text = {"txt": "<end>".join([document] * count), "jsonl": (json.dumps({"text": document}) + "\n") * count}
    path.write_text(text[kind])
    data = TextDataModule(path, tokenizer, length, 64, document_separator="<end>", validation_fraction=0)
    data.setup("fit")
    tokens = tokenizer.convert_tokens_to_ids(["<s>", *document.split(), "</s>"]) * count
    expected = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    assert sorted(rows_of(data).tolist()) == sorted(expected)
    assert len(expected) == count * 5 // length


@pytest.mark.parametrize("kind", ["txt", "jsonl", "a column"])
def test_a_byte_order_mark_is_no_token(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / f"marked.{'txt' if kind == 'txt' else 'jsonl'}"
    line = json.dumps({"text": ("\ufeff" if kind == "a column" else "") + "the cat"}, ensure_ascii=False)
    path.write_text("\ufeffthe cat" if kind == "txt" else line if kind == "a column" else f"\ufeff{line}", "utf-8")
    data = TextDataModule(path, tokenizer, 4, validation_fraction=0)
    data.setup("fit")
    assert tokenizer.decode(rows_of(data)[0]).split() == ["<s>", "the", "cat", "</s>"]


def test_batches_have_what_a_model_takes(tokenizer: Any, tmp_path: Path) -> None:
    data = TextDataModule(written(tmp_path, "txt"), tokenizer, 16, batch_size=3, num_workers=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert {value.shape for value in batch.values()} == {(3, 16)}
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["attention_mask"].all()


def test_the_split_holds_out_its_share_and_depends_on_the_seed_alone(tokenizer: Any, tmp_path: Path) -> None:
    path, splits = written(tmp_path, "jsonl"), []
    for seed in (0, 0, 1):
        data = TextDataModule(path, tokenizer, 4, validation_fraction=0.25, seed=seed)
        data.setup("fit")
        splits.append([batch["input_ids"].tolist() for batch in data.val_dataloader()])
    rows = len(stream(tokenizer)) // 4
    assert sum(map(len, splits[0])) == round(rows * 0.25)
    assert splits[0] == splits[1] != splits[2]
    everything = TextDataModule(path, tokenizer, 4, validation_fraction=0)
    everything.setup("fit")
    assert (len(rows_of(everything)), everything.val_dataloader()) == (rows, [])


def test_several_columns_are_joined_by_line_breaks(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "the cat", "answer": "sat on a mat"}) * 1)
    data = TextDataModule(path, tokenizer, 8, text_column=["question", "answer"], validation_fraction=0)
    data.setup("fit")
    assert tokenizer.decode(rows_of(data)[0]).split() == ["<s>", "the", "cat", "sat", "on", "a", "mat", "</s>"]


def test_a_tokenizer_folder_is_loaded(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = TextDataModule(written(tmp_path, "txt"), tmp_path / "tokenizer", 16)
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_what_cannot_be_read_is_told(tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": tmp_path / "nothing.txt"}, "There is no file"),
        ({"data": path, "text_column": "body"}, r"no column 'body'; it has \['text'\]"),
        ({"data": path, "sequence_length": 500}, "too short for one row of 500"),
        ({"data": path, "sequence_length": 160}, r"1 row\(s\) of 160 tokens, too few"),
    ]
    for arguments, message in cases:
        data = TextDataModule(tokenizer=tokenizer, **{"sequence_length": 8} | arguments)
        with pytest.raises(ValueError, match=message):
            data.setup("fit")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sequence_length": 1}, "`sequence_length`"),
        ({"validation_fraction": 1.0}, "`validation_fraction`"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            TextDataModule(path, tokenizer, **options)
