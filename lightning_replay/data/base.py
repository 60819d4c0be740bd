"""Documents as rows of tokens for training and validation."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_replay.data.files import explained, read_documents
from lightning_replay.utilities.validation import check_model_folder, is_number, is_whole

__all__ = ["DocumentDataModule"]


class DocumentDataModule(pl.LightningDataModule):
    """Reads documents, lets a subclass make rows of tokens of them, and holds a share of the rows out.

    Args:
        data: A local file, a local folder or the name of a dataset on the hub: see ``read_documents``.
        tokenizer: A tokenizer, a local folder with one, or a name on the hub.
        sequence_length: Tokens in a row.
        batch_size: Rows in a batch.
        columns: The columns that have to be there.
        document_separator: The text between documents in a ``.txt`` file. By default the file is one document.
        validation_fraction: Share of the rows that is held out, at least one row, unless it is 0.
        max_documents: How many documents to read at most; all of them by default.
        num_workers: Worker processes of each loader.
        split: Which split of a hub dataset to read.
        seed: Seed of the division into training and validation.
        trust_remote_code: Whether to execute code of its own that a tokenizer's folder or hub repository has.

    Raises:
        TypeError: If ``tokenizer`` is not a tokenizer.
        ValueError: If an argument is out of its range; at ``setup``, if a file can't be read, a column is missing or
            there are too few rows.
    """

    _columns_argument: str
    """The name of the subclass's argument for ``columns``, for messages."""

    def __init__(
        self,
        data: str | Path,
        tokenizer: str | Path | PreTrainedTokenizerBase,
        sequence_length: int,
        batch_size: int,
        columns: Sequence[str],
        document_separator: str | None,
        validation_fraction: float,
        max_documents: int | None,
        num_workers: int,
        split: str,
        seed: int,
        trust_remote_code: bool,
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
        check_model_folder(tokenizer)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        if not callable(tokenizer):
            raise TypeError(
                "`tokenizer` is a tokenizer of transformers, a folder with one or a name on the hub; "
                f"got {tokenizer!r}."
            )
        self.tokenizer: Any = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.columns = list(columns)
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

    @abstractmethod
    def rows_of(self, documents: Dataset) -> Dataset:
        """The rows of tokens that the documents make, at least one.

        Raises:
            ValueError: If they make none, or hold something that can't be read.
        """

    @abstractmethod
    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of rows."""

    @override
    def prepare_data(self) -> None:
        self._read()

    @override
    def setup(self, stage: str) -> None:
        if self._rows:
            return
        with explained(self.data):
            rows = self.rows_of(self._read())
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

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """The rows that are held out, or all rows if none is."""
        return self._loader("validation" if len(self._rows["validation"]) else "train", shuffle=False)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """The same as for a test."""
        return self.test_dataloader()

    def _loader(self, part: str, shuffle: bool) -> DataLoader[Any]:
        rows = self._rows[part].with_format("torch")
        return DataLoader(
            rows,
            batch_size=self.batch_size,  # by its name: to predict, Lightning makes the loader again
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=self.collate,
        )

    def _read(self) -> Dataset:
        """The documents, a row each."""
        documents = read_documents(self.data, self.split, self.document_separator)
        if missing := [repr(column) for column in self.columns if column not in documents.column_names]:
            raise ValueError(
                f"{self.data} has no column {', '.join(missing)}; it has {documents.column_names}. Set "
                f"`{self._columns_argument}`."
            )
        return documents if self.max_documents is None else documents.take(min(self.max_documents, len(documents)))
