"""The datamodule that mixes replay rows into the new task's batches."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_replay.buffers.buffer import ReplayBuffer
from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.buffers.shards import ReplayShards
from lightning_replay.data.batches import (
    Batches,
    PaddingSide,
    crop_batch,
    find_ignore_index,
    join_rows,
    row_count,
    rows_in,
)
from lightning_replay.data.feed import RowFeed
from lightning_replay.data.prior import Prior, check_prior, read_prior
from lightning_replay.data.share import REPLAY_FRACTION, Mode, ReplayShare
from lightning_replay.data.sources import BufferRows, MixedRows, RowSource, ShardRows
from lightning_replay.utilities.validation import check_package, is_number, is_whole

__all__ = ["ReplayDataModule"]

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
_HOOKS = ("prepare_data", "on_before_batch_transfer", "transfer_batch_to_device")


class ReplayDataModule(pl.LightningDataModule):
    """Mixes rows from a replay buffer into the training batches of any datamodule or dataloader.

    The Trainer gets the wrapped loaders unchanged, with their samplers, workers, lengths, shuffling and mid-epoch
    resume. Rows join the batch in the batch-transfer hook, in the main process, right before the step, so they are
    never stale. Validation, test and predict batches are never changed. If there are no replay rows, a batch stays as
    it is.

    Attributes of the wrapped datamodule that this class does not have can be read through it, and those in
    ``passed_on`` can be set. The two share their hyper-parameters.

    Note:
        Under ``SelfGeneratedReplay`` with any loss but ``"mixed"``, replay rows do not join the batch: they take a
        forward of their own, so ``training_step`` sees only the new rows.

    Note:
        All ranks hold equal buffers, those of rank 0 at the start of the fit, and draw from them in step. The share is
        that of all ranks' batches together, and each rank takes a part of the rows owed; ``drawn`` holds its part.

    Args:
        data: A datamodule, or the training dataloader itself.
        replay_fraction: Share of replay rows in the mixed batch, in [0, 1), exact in the long run: what a batch owes
            in fractions of a row is carried to the next.
        mode: ``"append"`` adds replay rows to the new ones. ``"replace"`` keeps the batch size: the last new rows give
            way, and at least one stays.
        prior: Real prior rows, if you have some: a ``ReplayBuffer``, a tensor of token rows, a dataloader of batches
            such as the model is trained on, or a datamodule, whose ``train_dataloader`` is used. A loader is read once
            at the start of the fit and kept in memory at 4 bytes a token. Each row is drawn once before any is drawn
            again. From a stream, which has no length, pass a part: ``list(itertools.islice(stream, 100))``.
        prior_share: Share of the replay rows that are real, in (0, 1], exact in the long run; the others are the
            buffer's. With 1, nothing is sampled.
        buffer: A ``ReplayBuffer`` of your own, to which you ``add`` rows or which ``SelfGeneratedReplay`` fills; by
            default the callback has its own. Or a folder of rows that ``lightning-replay generate`` wrote, or
            ``ReplayShards`` of it: rows are read when they are needed, each is used once (or ``uses_per_sample``
            times), and nothing is sampled.
        padding_side: The side on which rows are padded to a common length; by default that of the wrapped datamodule's
            ``tokenizer``, else the right.
        pad_token_id: The token to pad with; by default the wrapped datamodule's ``tokenizer.pad_token_id``, else 0.
        save_buffer: Whether checkpoints hold the rows of a ``ReplayBuffer`` of your own, at 4 bytes a token and 6 a
            cached log-probability. Without them, a resumed run draws from the rows that the buffer holds then.
        to_batch: For batches of other kinds: a function of the batch of new rows and the ``ReplayRows``
            (on the CPU) that returns the mixed batch.

    Raises:
        TypeError: If ``data`` is neither a datamodule nor iterable, or another argument is of a wrong type; in the
            fit, if ``to_batch`` returns something else than a batch.
        ValueError: If ``replay_fraction`` is outside [0, 1) or ``prior_share`` outside (0, 1], ``mode`` or
            ``padding_side`` is unknown, ``prior`` has no length, or a folder of rows is incomplete; at the start of the
            fit, if ``prior`` holds no row.
        FileNotFoundError: If ``buffer`` is a folder without rows.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(torch.randint(100, (64, 16)), batch_size=8)
        >>> data = ReplayDataModule(loader, replay_fraction=0.2)  # 8 new rows and 2 replay rows a batch
    """

    passed_on = ("batch_size",)
    """Attributes that are set on the wrapped datamodule: those that a tuner such as ``BatchSizeFinder`` changes."""

    def __init__(
        self,
        data: pl.LightningDataModule | Batches,
        replay_fraction: float = REPLAY_FRACTION,
        mode: Mode = "append",
        buffer: ReplayBuffer | ReplayShards | str | Path | None = None,
        prior: Prior | None = None,
        prior_share: float = 0.5,
        padding_side: PaddingSide | None = None,
        pad_token_id: int | None = None,
        to_batch: Callable[[Any, ReplayRows], Any] | None = None,
        save_buffer: bool = True,
    ) -> None:
        feed = RowFeed(ReplayShare(replay_fraction, mode))
        if padding_side not in (None, *get_args(PaddingSide)):
            raise ValueError(f"`padding_side` is 'left', 'right' or None; got {padding_side!r}.")
        if not is_number(prior_share) or not 0 < prior_share <= 1:
            raise ValueError(
                f"`prior_share` is the share of replay rows that are real, above 0 and up to 1; got {prior_share!r}."
            )
        if pad_token_id is not None and not is_whole(pad_token_id, 0):
            raise ValueError(f"`pad_token_id` is a token id, at least 0; got {pad_token_id!r}.")
        check_package(data, "`data`")
        if not isinstance(data, (pl.LightningDataModule, Iterable)) or isinstance(data, str):
            raise TypeError(f"`data` is a LightningDataModule or a dataloader; got {type(data).__name__}.")
        if buffer is not None and not isinstance(buffer, (ReplayBuffer, ReplayShards, str, Path)):
            raise TypeError(
                f"`buffer` is a ReplayBuffer or a folder of generated rows; got {type(buffer).__name__}. Pass your "
                "rows as `prior`."
            )
        if not save_buffer and not isinstance(buffer, ReplayBuffer):
            raise ValueError(
                "`save_buffer=False` leaves the rows of a `buffer` out of checkpoints, and no ReplayBuffer was given. "
                "Leave it out. For sampled rows, set `save_rows = False` on SelfGeneratedReplay."
            )
        if to_batch is not None and not callable(to_batch):
            raise TypeError(f"`to_batch` is a function of the batch and the ReplayRows; got {to_batch!r}.")
        check_prior(prior)
        self.wrapped = data if isinstance(data, pl.LightningDataModule) else _TrainLoader(data)
        super().__init__()
        self.feed = feed
        """Draws the replay rows of each batch."""
        if isinstance(buffer, (str, Path)):
            buffer = ReplayShards(buffer)
        self.shards = ShardRows(buffer) if isinstance(buffer, ReplayShards) else None
        """The rows of the folder that was given as ``buffer``, if any."""
        self.buffer = buffer if isinstance(buffer, ReplayBuffer) else None
        """The buffer that was given, or that a checkpoint restored."""
        self.prior: ReplayBuffer | None = None
        """Real prior rows, from the start of the fit on."""
        self.prior_share = prior_share
        self.to_batch = to_batch
        self.save_buffer = save_buffer

        tokenizer = getattr(self.wrapped, "tokenizer", None)
        tokenizer_side: PaddingSide = getattr(tokenizer, "padding_side", "right")
        self.padding_side: PaddingSide = padding_side or tokenizer_side
        own_padding = getattr(tokenizer, "pad_token_id", None) if pad_token_id is None else pad_token_id
        self.pad_token_id: int = own_padding or 0
        self._given_prior = prior
        self._ignore_index: int | None = None
        self._mixed_rows: MixedRows | None = None
        self._attached: RowSource | None = None
        self._show_as_wrapped()
        self.save_hyperparameters({"replay_fraction": replay_fraction, "replay_mode": mode})
        if prior is not None:
            self.save_hyperparameters({"replay_prior_share": prior_share})

    @property
    def replay_fraction(self) -> float:
        """Share of replay rows in the mixed batch."""
        return self.feed.share.fraction

    @property
    def drawn(self) -> ReplayRows | None:
        """This rank's replay rows of the batch that was last made ready for training."""
        return self.feed.drawn

    @property
    def trainer(self) -> pl.Trainer | None:
        """The Trainer, which the wrapped datamodule sees as well."""
        trainer: pl.Trainer | None = self.wrapped.trainer
        return trainer

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        check_package(trainer, "The Trainer")
        self.wrapped.trainer = trainer

    def __getattr__(self, name: str) -> Any:
        """Attributes of the wrapped datamodule, for modules that read them off ``trainer.datamodule``."""
        if name.startswith("_") or name == "wrapped":  # private, or asked for while unpickling
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set attributes of this datamodule, and those that are ``passed_on`` of the wrapped one."""
        if name in self.passed_on:
            setattr(self.wrapped, name, value)
        else:
            super().__setattr__(name, value)

    def attach(self, source: RowSource, joins_batch: bool = True) -> Callable[[], None]:
        """Draw replay rows from another source than the datamodule's own.

        Real prior rows, if there are any, keep their share.

        Args:
            source: The source.
            joins_batch: Whether drawn rows join the batch. If not, they can be read from ``drawn``.

        Returns:
            A function that detaches the source.
        """
        self._attached, self.feed.joins_batch = source, joins_batch
        self._connect()
        return self._detach

    def cache_prior(self, cache: Callable[[ReplayRows], ReplayRows]) -> None:
        """Keep a reference's log-probabilities with the real prior rows.

        Args:
            cache: Returns the rows it is given with ``top_ids`` and ``top_log_probs``.
        """
        assert self.prior is not None
        self.prior = self.prior.with_cache(cache)
        self._connect()

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            if self.trainer is not None:
                self.feed.begin(self.trainer)
            if self.replay_fraction and self._given_prior is not None and self.prior is None:
                with isolate_rng():
                    self.prior = read_prior(self._given_prior, self.trainer)
            if self.replay_fraction and self.trainer is not None:
                self._begin_with_equal_rows()
                if self.shards is not None:
                    self.shards.begin(self.trainer, self.feed.processes)
            self._connect()
        self.wrapped.setup(stage)

    @override
    def teardown(self, stage: str) -> None:
        self.feed.end()
        self.wrapped.teardown(stage)

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.feed.drawn = None
        self.wrapped.on_exception(exception)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer = self.trainer
        assert trainer is not None
        # Without us Lightning would have called the wrapped datamodule's hook, or else the module's.
        owner = self.wrapped if is_overridden("on_after_batch_transfer", self.wrapped) else trainer.lightning_module
        batch = owner.on_after_batch_transfer(batch, dataloader_idx)
        return self.mixed(batch) if trainer.training else batch

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "share": self.feed.share.state_dict(),
            "buffer": self.buffer.state_dict() if self.buffer is not None and self.save_buffer else None,
            "buffer_left_out": self.buffer is not None and not self.save_buffer,
            "shards": None if self.shards is None else self.shards.state_dict(),
            # Rows can be read again; a reference's log-probabilities can't.
            "prior": None if self.prior is None else self.prior.state_dict(rows=self.prior.top_k > 0),
            "mixed_rows": None if self._mixed_rows is None else self._mixed_rows.state_dict(),
            "wrapped": self.wrapped.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["buffer_left_out"]:
            rank_zero_warn(
                "The checkpoint was saved with `ReplayDataModule(save_buffer=False)`, so the replay rows are those "
                "that your own buffer holds now: the run does not continue bit for bit as if it had not stopped."
            )
        shards = state_dict["shards"]
        if (shards is None) != (self.shards is None):
            raise MisconfigurationException(
                f"The checkpoint's replay rows {'were sampled' if shards is None else 'came from a folder'}, and this "
                f"run's {'are sampled' if self.shards is None else 'come from a folder'}. Resume with the `buffer` of "
                "the run that saved it."
            )
        if self.shards is not None and shards is not None:
            self.shards.load_state_dict(shards)
        if state_dict["buffer"] is not None:
            if self.buffer is None:
                self.buffer = ReplayBuffer.from_state_dict(state_dict["buffer"])
            else:
                self.buffer.load_state_dict(state_dict["buffer"])
        self.feed.share.load_state_dict(state_dict["share"])
        prior = state_dict["prior"]
        if prior is not None and "tokens" in prior:
            self.prior = ReplayBuffer.from_state_dict(prior, None if self.prior is None else self.prior.policy)
        elif prior is not None and self.prior is not None:
            self.prior.load_state_dict(prior)
        self._connect()
        if self._mixed_rows is not None and state_dict["mixed_rows"] is not None:
            self._mixed_rows.load_state_dict(state_dict["mixed_rows"])
        self.wrapped.load_state_dict(state_dict["wrapped"])

    def mixed(self, batch: Any) -> Any:
        """A batch of new rows with the replay rows that go with it; called for each training batch."""
        joins = self.feed.joins_batch and self.to_batch is None
        kept = self.feed.next(batch, row_count if joins else rows_in)
        if kept is not None:
            batch = crop_batch(batch, kept)
        own = self.drawn
        if own is None or not self.feed.joins_batch:
            return batch
        if self.to_batch is not None:
            return _checked_mix(self.to_batch(batch, own), batch)
        # A batch without padding does not show the label of padding; an earlier one may have.
        found = find_ignore_index(batch)
        self._ignore_index = self._ignore_index if found is None else found
        return join_rows(
            batch,
            own,
            padding_side=self.padding_side,
            pad_token_id=self.pad_token_id,
            ignore_index=self._ignore_index,
        )

    def _connect(self) -> None:
        """Let the feed draw from the attached source, or else from the datamodule's own, and from real prior rows."""
        own = self.shards if self.buffer is None else BufferRows(self.buffer)
        source = own if self._attached is None else self._attached
        if self.prior is not None:
            if self._mixed_rows is None:
                self._mixed_rows = MixedRows(BufferRows(self.prior), self.prior_share, source)
            self._mixed_rows.prior, self._mixed_rows.other = BufferRows(self.prior), source
            source = self._mixed_rows
        self.feed.source = source

    def _detach(self) -> None:
        self._attached, self.feed.joins_batch, self.feed.drawn = None, True, None
        self._connect()

    def _begin_with_equal_rows(self) -> None:
        """Let every rank begin with the rows of the first one."""
        processes = self.feed.processes
        if processes.size == 1:
            return
        for buffer in (self.buffer, self.prior):
            state = processes.broadcast(None if buffer is None else buffer.state_dict())
            if buffer is not None and state is not None:
                processes.run_on_all_ranks(functools.partial(buffer.load_state_dict, state))

    def _show_as_wrapped(self) -> None:
        """Take over the hooks, hyper-parameters and switches of the wrapped datamodule."""
        # An attribute of the instance counts as an override for Lightning, so it sees exactly the hooks that the
        # wrapped datamodule has, and the module keeps its own if the wrapped datamodule has none.
        for name in (*_LOADERS, *_HOOKS):
            if is_overridden(name, self.wrapped):
                setattr(self, name, getattr(self.wrapped, name))
        if self.wrapped.hparams:
            # The same object, not a copy: what tunes one of them, as `BatchSizeFinder` does, reaches the loaders.
            self._hparams = self.wrapped.hparams
        self.prepare_data_per_node = self.wrapped.prepare_data_per_node
        self.allow_zero_length_dataloader_with_multiple_devices = (
            self.wrapped.allow_zero_length_dataloader_with_multiple_devices
        )


def _checked_mix(mixed: Any, batch: Any) -> Any:
    """The result of `to_batch`, if it is a batch of the kind that `training_step` takes."""
    kinds: Any = next((kind for kind in (Mapping, (tuple, list), Tensor) if isinstance(batch, kind)), type(batch))
    if not isinstance(mixed, kinds):
        raise TypeError(
            f"`to_batch` returned {type(mixed).__name__} for a batch that is {type(batch).__name__}; it returns a "
            "batch of that kind, of the new rows and the replay rows together."
        )
    return mixed


class _TrainLoader(pl.LightningDataModule):
    """A bare training loader as a datamodule."""

    def __init__(self, loader: Batches) -> None:
        super().__init__()
        self.loader = loader

    @override
    def train_dataloader(self) -> Batches:
        return self.loader
