"""Prior data that users have: what is replayed of it, and what is measured on."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_replay.buffers.buffer import ReplayBuffer
from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.data.batches import Batches, rows_of
from lightning_replay.utilities.validation import check_package

__all__ = ["Prior", "check_prior", "loader_of", "read_prior"]

Prior = ReplayBuffer | pl.LightningDataModule | Tensor | Batches
Part = Literal["train_dataloader", "val_dataloader"]


def check_prior(prior: Any) -> None:
    """Refuse what isn't rows, and a loader that might never end."""
    check_package(prior, "`prior`")
    if prior is None or isinstance(prior, (ReplayBuffer, Tensor, pl.LightningDataModule)):
        return
    if not isinstance(prior, Iterable) or isinstance(prior, (str, Mapping)):
        raise TypeError(
            "`prior` is a ReplayBuffer, a tensor of token rows, a datamodule or a dataloader of batches; got "
            f"{type(prior).__name__}."
        )
    if sized_len(prior) is None:
        raise ValueError(
            "`prior` is read to its end and kept in memory, but it has no length, so it might never end. Pass a part "
            "of it: `prior=list(itertools.islice(prior, 100))` for 100 batches."
        )


def loader_of(data: pl.LightningDataModule, part: Part, trainer: pl.Trainer | None) -> Batches:
    """A loader of a datamodule that is not the Trainer's own, made ready as the Trainer makes its own ready.

    Args:
        data: The datamodule.
        part: The name of the loader.
        trainer: Whose processes all call this; None for a single one.

    Raises:
        MisconfigurationException: If the datamodule has no such loader.
    """
    if not is_overridden(part, data):
        raise MisconfigurationException(
            f"{type(data).__name__} is given as prior data, but it has no `{part}`. Pass a datamodule that has one, or "
            "a dataloader."
        )
    if trainer is None or not (trainer.local_rank if data.prepare_data_per_node else trainer.global_rank):
        data.prepare_data()
    if trainer is not None:
        trainer.strategy.barrier()
    data.setup("fit")
    loader: Batches = getattr(data, part)()
    return loader


def read_prior(prior: Prior, trainer: pl.Trainer | None) -> ReplayBuffer:
    """Real prior rows in a buffer of their own.

    Args:
        prior: Where they are; of a datamodule, its ``train_dataloader``.
        trainer: Whose processes all call this; None for a single one.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(prior, pl.LightningDataModule):
        prior = loader_of(prior, "train_dataloader", trainer)
        check_prior(prior)
    if isinstance(prior, ReplayBuffer):
        return prior
    batches = [prior] if isinstance(prior, Tensor) else prior
    parts = [rows_of(batch) for batch in batches]
    if not any(int(part.lengths.sum()) for part in parts):
        raise ValueError("`prior` holds no row to replay. Pass a loader or a tensor with at least one row of tokens.")
    rows = ReplayRows.cat(parts)
    rows = rows.take(rows.lengths > 0)
    buffer = ReplayBuffer(*rows.tokens.shape)
    buffer.add(rows)
    return buffer
