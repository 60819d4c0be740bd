"""Real prior data: the rows that are replayed, and the loaders of sets to measure on."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_replay.buffers.buffer import ReplayBuffer
from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.data.batches import Batches, first_batches, rows_of
from lightning_replay.utilities.validation import check_package

__all__ = ["Prior", "check_prior", "loader_of", "read_prior"]

Prior = ReplayBuffer | pl.LightningDataModule | Tensor | Batches
Part = Literal["train_dataloader", "val_dataloader"]


def check_prior(prior: Any) -> None:
    """Refuse prior data that is not rows or batches, or a loader that might never end.

    Raises:
        TypeError: If it is of another type, or several loaders.
        ValueError: If it has no length.
    """
    check_package(prior, "`prior`")
    if prior is None or isinstance(prior, (ReplayBuffer, Tensor, pl.LightningDataModule)):
        return
    loaders = prior if isinstance(prior, (list, tuple)) else []
    if isinstance(prior, (CombinedLoader, Mapping)) or any(isinstance(each, DataLoader) for each in loaders):
        raise TypeError(
            f"`prior` is one dataloader, and a {type(prior).__name__} holds several. Join the batches of all, as in "
            "`prior=[*first_loader, *second_loader]`."
        )
    if not isinstance(prior, Iterable) or isinstance(prior, str):
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
    """A loader of a datamodule other than the Trainer's, prepared and set up as the Trainer does with its own.

    Args:
        data: The datamodule.
        part: The name of the loader.
        trainer: The Trainer, if there is one; then each of its processes has to call this.

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


def read_prior(prior: Prior, trainer: pl.Trainer | None, vocabulary: int | None = None) -> ReplayBuffer:
    """Real prior rows in a buffer of their own, in the same order each time.

    Args:
        prior: The rows; of a datamodule, the batches of its ``train_dataloader``.
        trainer: The Trainer, if there is one; then each of its processes has to call this.
        vocabulary: The number of the model's token ids, if it is known; labels from there on are left out.

    Raises:
        TypeError: If a batch is not of a kind that can be replayed, or its rows are packed.
        ValueError: If there are no rows, or a batch's labels are not the tokens that they stand for.
    """
    if isinstance(prior, pl.LightningDataModule):
        prior = loader_of(prior, "train_dataloader", trainer)
        check_prior(prior)
    if isinstance(prior, ReplayBuffer):
        return prior
    batches = [prior] if isinstance(prior, Tensor) else prior
    parts = []
    # In the same order when a run is resumed, of whose rows the checkpoint has the numbers alone.
    for number, batch in enumerate(first_batches(batches, None)):
        try:
            parts.append(rows_of(batch, vocabulary))
        except (TypeError, ValueError) as error:
            raise type(error)(f"Batch {number} of `prior` can't be replayed. {error}") from error
    if not any(int(part.lengths.sum()) for part in parts):
        raise ValueError("`prior` holds no row to replay. Pass a loader or a tensor with at least one row of tokens.")
    rows = ReplayRows.cat(parts)
    rows = rows.take(rows.lengths > 0)
    buffer = ReplayBuffer(*rows.tokens.shape)
    buffer.add(rows)
    return buffer
