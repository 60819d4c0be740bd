"""LightningModules as their users would write them, with no thought of replay, and data for them."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

VOCABULARY = 32


class Rows(Dataset[dict[str, Tensor]]):
    """Random rows with a pattern that can be learned: each token is followed by the next id."""

    def __init__(self, rows: int = 64, length: int = 12, seed: int = 0) -> None:
        starts = torch.randint(3, VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(seed))
        self.tokens = 3 + (starts + torch.arange(length)) % (VOCABULARY - 3)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


def mapping_loader(rows: int = 64, length: int = 12, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(Rows(rows, length), batch_size=batch_size, **options)


def tensor_loader(rows: int = 64, length: int = 12, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    tokens: Any = Rows(rows, length).tokens
    return DataLoader(tokens, batch_size=batch_size, **options)


def pair_loader(rows: int = 64, length: int = 12, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    tokens = Rows(rows, length + 1).tokens
    pairs: Any = [(row[:-1], row[1:]) for row in tokens]
    return DataLoader(pairs, batch_size=batch_size, **options)


class UserModule(L.LightningModule):
    """Leaves the loss to the model; keeps what its step saw."""

    def __init__(self, model: nn.Module, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.batches: list[Any] = []
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches.append(batch)
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)


class PlainDescent(UserModule):
    """For comparing weights: Adam turns the last bit of a gradient near zero into a whole step."""

    def __init__(self, model: nn.Module, learning_rate: float = 0.1) -> None:
        super().__init__(model, learning_rate)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=self.learning_rate)


class OwnCrossEntropy(UserModule):
    """Takes its targets from the input ids, so it would train on any row that is in the batch."""

    def loss(self, batch: Any) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


class HandWritten(nn.Module):
    """A model that maps tokens to logits and knows nothing of caches or configurations."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 16, context: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        hidden = self.embedding(tokens) + self.positions(torch.arange(length, device=tokens.device))
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        logits: Tensor = self.head(self.block(hidden, src_mask=causal, is_causal=True))
        return logits


class TokensModule(UserModule):
    """For bare token tensors, as LitGPT's pretraining has them."""

    def loss(self, batch: Any) -> Tensor:
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class PairModule(UserModule):
    """For (tokens, targets) pairs."""

    def loss(self, batch: Any) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())


class DrawnRows(L.Callback):
    """Keeps the replay rows of each step."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        drawn = trainer.datamodule.drawn  # type: ignore[attr-defined]
        self.rows.append(drawn.tokens)


def quiet_trainer(**options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 6,
    }
    return L.Trainer(**defaults | options)
