"""Text from local files or the Hugging Face hub, packed to rows of one length."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_replay.data.base import DocumentDataModule

__all__ = ["TextDataModule"]

_MARK = "\ufeff"


class TextDataModule(DocumentDataModule):
    """Tokenises text, packs it to rows of ``sequence_length`` tokens and splits them into training and validation.

    Each document is put between the tokenizer's beginning- and end-of-sequence tokens, if it has them; documents then
    follow one another without gaps, and the last tokens, too few for a row, are dropped. Batches are mappings with
    ``input_ids``, ``attention_mask`` and ``labels``, each of shape ``(batch_size, sequence_length)``.

    Args:
        data: A local file (``.txt``, ``.json``, ``.jsonl``, ``.csv``, ``.parquet`` and others, also compressed), a
            local folder, or the name of a dataset on the hub: see ``read_documents``.
        tokenizer: A tokenizer, a local folder with one, or a name on the hub.
        sequence_length: Tokens in a row.
        batch_size: Rows in a batch.
        text_column: The column to read; several are joined by line breaks.
        document_separator: The text between documents in a ``.txt`` file. By default the file is one document.
        validation_fraction: Share of the rows that is held out, at least one row, unless it is 0.
        max_documents: How many documents to read at most; all of them by default.
        num_workers: Worker processes of each loader.
        split: Which split of a hub dataset to read.
        seed: Seed of the division into training and validation.
        trust_remote_code: Whether to execute code of its own that a tokenizer's folder or hub repository has. By
            default, such a tokenizer is refused.

    Raises:
        TypeError: If ``tokenizer`` is not a tokenizer.
        ValueError: If an argument is out of its range, or the tokenizer needs code of its own; at ``setup``, if the
            file can't be read, the column is missing or holds something else than text, or the text is too short for a
            row.

    Example:
        >>> data = TextDataModule("stories.jsonl", tokenizer="gpt2", sequence_length=256)  # doctest: +SKIP
    """

    _columns_argument = "text_column"

    def __init__(
        self,
        data: str | Path,
        tokenizer: str | Path | PreTrainedTokenizerBase,
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
        columns = [text_column] if isinstance(text_column, str) else list(text_column)
        super().__init__(
            data,
            tokenizer,
            sequence_length,
            batch_size,
            columns,
            document_separator,
            validation_fraction,
            max_documents,
            num_workers,
            split,
            seed,
            trust_remote_code,
        )

    @override
    def rows_of(self, documents: Dataset) -> Dataset:
        # One packer for all batches of documents, so that a row may begin in one and end in the next.
        packer = _Packer(self.tokenizer, self.columns, self.sequence_length)
        rows = documents.map(packer, batched=True, remove_columns=documents.column_names)
        if not len(rows):
            raise ValueError(f"{self.data} is too short for one row of {self.sequence_length} tokens.")
        return rows

    @override
    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tokens = default_collate(rows)["input_ids"]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


class _Packer:
    """Makes rows of batches of documents, which it is given in order."""

    def __init__(self, tokenizer: Any, columns: list[str], length: int) -> None:
        self.tokenizer = tokenizer
        self.columns = columns
        self.length = length
        special = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        self.start, self.end = ([] if token is None else [token] for token in special)
        self.rest: list[int] = []

    def __call__(self, documents: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        for column in self.columns:
            strangers = {type(text).__name__ for text in documents[column] if not isinstance(text, str)}
            if strangers:
                raise ValueError(
                    f"The column {column!r} holds {', '.join(sorted(strangers))} among its texts. Set `text_column` to "
                    "a column of text, and leave out documents that have none."
                )
        # Some files of documents have kept the byte-order marks of the files that they were made of.
        parts = zip(*([text.removeprefix(_MARK) for text in documents[column]] for column in self.columns), strict=True)
        encoded = self.tokenizer(["\n".join(texts) for texts in parts], add_special_tokens=False)["input_ids"]
        stream = self.rest + list(chain.from_iterable([*self.start, *ids, *self.end] for ids in encoded))
        whole = len(stream) // self.length * self.length
        self.rest = stream[whole:]
        return {"input_ids": [stream[i : i + self.length] for i in range(0, whole, self.length)]}
