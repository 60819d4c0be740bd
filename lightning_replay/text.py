"""Text from the Hugging Face hub or from local files, packed to rows of one length."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from transformers import AutoTokenizer
from typing_extensions import override

from lightning_replay.arguments import is_number, is_whole

__all__ = ["TextDataModule"]

_READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class TextDataModule(pl.LightningDataModule):
    """Tokenises text, packs it to rows of ``sequence_length`` tokens and splits them into training and validation.

    Each document is put between the tokenizer's beginning- and end-of-sequence tokens, where it has them; documents
    then follow one another without gaps, and what does not fill a last row is dropped. Batches are mappings with
    ``input_ids``, ``attention_mask`` and ``labels``, each of shape ``(batch_size, sequence_length)``.

    Args:
        data: A local ``.txt``, ``.json``, ``.jsonl`` or ``.parquet`` file, or the name of a dataset on the hub.
        tokenizer: A tokenizer, a local folder with one, or a name on the hub.
        sequence_length: Tokens in a row.
        batch_size: Rows in a batch.
        text_column: The column to read; several are joined by line breaks.
        document_separator: What stands between documents in a ``.txt`` file. By default the file is one document.
        validation_fraction: Share of the rows that is held out, at least one row, unless it is 0.
        max_documents: How many documents to read at most; all of them by default.
        num_workers: Worker processes of each loader.
        split: Which split of a hub dataset to read.
        seed: Seed of the division into training and validation.
        trust_remote_code: Whether a tokenizer's folder or hub repository may bring code of its own, which is then
            executed. Without, such a tokenizer is refused.

    Raises:
        TypeError: If ``tokenizer`` is none.
        ValueError: If an argument is out of its range, or the tokenizer needs code of its own; at ``setup``, if the
            column is missing or holds something else than text, or the text is too short for a row.

    Example:
        >>> data = TextDataModule("stories.jsonl", tokenizer="gpt2", sequence_length=256)  # doctest: +SKIP
    """

    def __init__(
        self,
        data: str | Path,
        tokenizer: Any,
        sequence_length: int = 512,
        batch_size: int = 8,
        text_column: str | Sequence[str] = "text",
        document_separator: str | None = None,
        validation_fraction: float = 0.05,
        max_documents: int | None = None,
        num_workers: int = 0,
        split: str = "train",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if not is_whole(sequence_length, 2):
            raise ValueError(f"`sequence_length` is the tokens in a row, at least 2; got {sequence_length!r}.")
        if not is_number(validation_fraction) or not 0 <= validation_fraction < 1:
            raise ValueError(f"`validation_fraction` is from 0 to below 1; got {validation_fraction!r}.")
        if max_documents is not None and not is_whole(max_documents, 1):
            raise ValueError(f"`max_documents` is at least 1, or None for all; got {max_documents!r}.")
        for name, number, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if not is_whole(number, least):
                raise ValueError(f"`{name}` is a whole number, at least {least}; got {number!r}.")
        if document_separator == "":
            raise ValueError("`document_separator` is a text of at least one character, or None; got ''.")
        self.data = str(data)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        if not callable(tokenizer):
            raise TypeError(
                "`tokenizer` is a tokenizer of transformers, a folder with one or a name on the hub; "
                f"got {tokenizer!r}."
            )
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        self.document_separator = document_separator
        self.validation_fraction = validation_fraction
        self.max_documents = max_documents
        self.num_workers = num_workers
        self.split = split
        self.seed = seed
        self.save_hyperparameters(
            {"data": self.data, "sequence_length": sequence_length, "batch_size": batch_size}, logger=True
        )
        self._rows: dict[str, Dataset] = {}

    @override
    def prepare_data(self) -> None:
        self._read()

    @override
    def setup(self, stage: str) -> None:
        if self._rows:
            return
        rows = self._pack(self._read())
        if not len(rows):
            raise ValueError(f"{self.data} is too short for one row of {self.sequence_length} tokens.")
        held_out = round(len(rows) * self.validation_fraction)
        if self.validation_fraction:
            held_out = max(1, held_out)
            if held_out == len(rows):
                raise ValueError(
                    f"{self.data} gives {len(rows)} row(s) of {self.sequence_length} tokens, too few to hold one out. "
                    "Set `validation_fraction=0` or a smaller `sequence_length`."
                )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        self._rows = {"train": rows.select(order[held_out:]), "validation": rows.select(order[:held_out])}

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader("validation", shuffle=False) if len(self._rows["validation"]) else []

    def _loader(self, part: str, shuffle: bool) -> DataLoader[Any]:
        rows = self._rows[part].with_format("torch")
        return DataLoader(rows, self.batch_size, shuffle=shuffle, num_workers=self.num_workers, collate_fn=_collate)

    def _read(self) -> Dataset:
        """The documents, a row each."""
        path = Path(self.data)
        if path.suffix not in _READERS:
            documents = load_dataset(self.data, split=self.split)
        elif not path.is_file():
            raise ValueError(
                f"There is no file {path.absolute()}. `data` is a local file or the name of a hub dataset."
            )
        elif path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            parts = [text] if self.document_separator is None else text.split(self.document_separator)
            stripped = (part.strip() for part in parts)
            documents = Dataset.from_dict({"text": [part for part in stripped if part]})
        else:
            documents = load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        missing = [column for column in self.text_columns if column not in documents.column_names]
        if missing:
            raise ValueError(
                f"{self.data} has no column {missing}; it has {documents.column_names}. Set `text_column`."
            )
        return documents if self.max_documents is None else documents.take(min(self.max_documents, len(documents)))

    def _pack(self, documents: Dataset) -> Dataset:
        return documents.map(
            _pack,
            batched=True,
            remove_columns=documents.column_names,
            fn_kwargs={
                "tokenizer": self.tokenizer,
                "columns": self.text_columns,
                "length": self.sequence_length,
            },
        )


def _pack(documents: dict[str, list[str]], tokenizer: Any, columns: list[str], length: int) -> dict[str, Any]:
    for column in columns:
        strangers = {type(text).__name__ for text in documents[column] if not isinstance(text, str)}
        if strangers:
            raise ValueError(
                f"The column {column!r} holds {', '.join(sorted(strangers))} among its texts. Set `text_column` to a "
                "column of text, and leave out documents that have none."
            )
    texts = ["\n".join(parts) for parts in zip(*(documents[column] for column in columns), strict=True)]
    special = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    start, end = ([] if token is None else [token] for token in special)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = list(chain.from_iterable([*start, *ids, *end] for ids in encoded))
    whole = len(stream) // length * length
    return {"input_ids": [stream[i : i + length] for i in range(0, whole, length)]}


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    tokens = default_collate(rows)["input_ids"]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}
