"""The datamodule that mixes replay rows into the new task's batches."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
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
    join_rows,
    nested_row_count,
    row_count,
    token_count,
)
from lightning_replay.data.prior import Prior, check_prior, read_prior
from lightning_replay.utilities.distributed import Processes
from lightning_replay.utilities.validation import check_choice, check_package, is_number, is_whole

__all__ = ["ReplayDataModule"]

Mode = Literal["append", "replace"]
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
_HOOKS = ("prepare_data", "on_before_batch_transfer", "transfer_batch_to_device")


class ReplayDataModule(pl.LightningDataModule):
    """Mixes rows from a replay buffer into the training batches of any datamodule or dataloader.

    The wrapped loaders reach the Trainer untouched: samplers, workers, lengths, shuffling and mid-epoch resume are
    theirs. Rows join the batch in the batch-transfer hook, in the main process, right before the step, so they are
    never stale. Validation, test and predict batches are never touched. Where the buffer is empty and nothing fills
    it, a batch stays as it is.

    Attributes of the wrapped datamodule that this class doesn't have can be read and set through it, and its
    hyper-parameters are this one's, too.

    Note:
        Under ``SelfGeneratedReplay`` with ``loss="kl"`` or ``"ntp"``, the rows drawn here travel with the model's
        forward instead of joining the batch, so that ``training_step`` and its own loss see the new rows alone.

    Note:
        Several processes hold equal buffers, those of process 0 at the start of the fit, and draw from them in step:
        the share is that of their batches together, and each takes other ones of the rows owed. ``drawn`` are its own.

    Args:
        data: A datamodule, or the training dataloader itself.
        replay_fraction: Share of replay rows in the mixed batch, in [0, 1), exact in the long run: what a batch owes
            in fractions of a row is carried to the next.
        mode: ``"append"`` keeps every new row and adds to them; ``"replace"`` keeps the batch size: the last
            new rows give way, at least one stays.
        prior: Real prior rows, where you have some: a ``ReplayBuffer``, a tensor of token rows, or a dataloader
            of batches such as the model is trained on, which is read once at the start of the fit and kept in memory
            at 4 bytes a token; of a datamodule, its ``train_dataloader``. A row is drawn again when all have been. Of
            a stream, which has no length, pass a part: ``list(itertools.islice(stream, 100))``.
        prior_share: Share of the replay rows that are real, in (0, 1], exact in the long run; the others are the
            buffer's. With 1, nothing is sampled.
        buffer: The replay buffer. By default ``SelfGeneratedReplay`` makes one; for replay of
            rows of your own, make one and ``ReplayBuffer.add`` them. Or a folder of rows that
            ``lightning-replay generate`` wrote, or ``ReplayShards`` of it: they are read as they
            are needed, each is used once (or ``uses_per_sample`` times), and nothing is sampled.
        padding_side: Where rows are padded to a common length; by default as the wrapped datamodule's ``tokenizer``
            does, else on the right.
        pad_token_id: The token to pad with; by default the wrapped datamodule's ``tokenizer.pad_token_id``, else 0.
        save_buffer: Whether checkpoints hold the buffer's rows, at 4 bytes a token and what is cached of them. Without
            them, a resumed run samples anew, so it goes on well, but not bit for bit as if it had not stopped.
        to_batch: For batches of other kinds: a function of the batch of new rows and the ``ReplayRows``
            (on the CPU) that returns the mixed batch.

    Raises:
        TypeError: If ``data`` is neither a datamodule nor iterable, or another argument is of a wrong type; in the
            fit, if ``to_batch`` returns something else than a batch.
        ValueError: If ``replay_fraction`` is outside [0, 1) or ``prior_share`` outside (0, 1], ``mode`` or
            ``padding_side`` is unknown, ``prior`` has no length, or a folder of rows is not whole; at the start of the
            fit, if ``prior`` holds no row.
        FileNotFoundError: If ``buffer`` is a folder without rows.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(torch.randint(100, (64, 16)), batch_size=8)
        >>> data = ReplayDataModule(loader, replay_fraction=0.2)  # 8 new rows and 2 replay rows a batch
    """

    def __init__(
        self,
        data: pl.LightningDataModule | Batches,
        replay_fraction: float = 0.2,
        mode: Mode = "append",
        buffer: ReplayBuffer | ReplayShards | str | Path | None = None,
        prior: Prior | None = None,
        prior_share: float = 0.5,
        padding_side: PaddingSide | None = None,
        pad_token_id: int | None = None,
        to_batch: Callable[[Any, ReplayRows], Any] | None = None,
        save_buffer: bool = True,
    ) -> None:
        if not is_number(replay_fraction) or not 0 <= replay_fraction < 1:
            raise ValueError(
                f"`replay_fraction` is the share of replay rows in the mixed batch, from 0 to below 1; "
                f"got {replay_fraction!r}."
            )
        check_choice("mode", mode, Mode)
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
        if to_batch is not None and not callable(to_batch):
            raise TypeError(f"`to_batch` is a function of the batch and the ReplayRows; got {to_batch!r}.")
        check_prior(prior)
        self.wrapped = data if isinstance(data, pl.LightningDataModule) else _TrainLoader(data)
        super().__init__()
        self.replay_fraction = replay_fraction
        self.mode: Mode = mode
        if isinstance(buffer, (str, Path)):
            buffer = ReplayShards(buffer)
        self.shards = buffer if isinstance(buffer, ReplayShards) else None
        """The folder that the buffer's rows come from, if any."""
        self.buffer = buffer if isinstance(buffer, ReplayBuffer) else None
        self.prior_share = prior_share
        self.to_batch = to_batch
        self.save_buffer = save_buffer
        self.refill: Callable[[Any], None] | None = None
        """Called with the batch of new rows when every row of the buffer has been used and more are needed."""
        self.uses_per_sample: int | None = 1
        """How often a row is drawn before it is replaced; None if there is nothing to replace it with."""
        self.joins_batch = True
        """Whether drawn rows join the batch; where not, somebody else sees to it that they are trained on."""
        self.drawn: ReplayRows | None = None
        """The replay rows of the batch that was last made ready for training."""
        self.drawn_weight = 1.0
        """What to multiply the mean loss on ``drawn`` by, so that the average over all processes is the mean over the
        target tokens of all."""
        self.new_tokens = 0
        """Tokens of new rows in this fit, padding included, in all processes; 0 for batches of a kind that is not
        known."""
        self.replay_tokens = 0
        """Tokens of replay rows in this fit, in all processes."""
        self.prior: ReplayBuffer | None = None
        """Real prior rows, from the start of the fit on."""
        self.processes = Processes()
        """The processes of the fit."""

        tokenizer = getattr(self.wrapped, "tokenizer", None)
        tokenizer_side: PaddingSide = getattr(tokenizer, "padding_side", "right")
        self.padding_side: PaddingSide = padding_side or tokenizer_side
        own_padding = getattr(tokenizer, "pad_token_id", None) if pad_token_id is None else pad_token_id
        self.pad_token_id: int = own_padding or 0

        self._prior = prior
        self._share = Fraction(float(replay_fraction)).limit_denominator(1_000_000)
        self._prior_share = Fraction(float(prior_share)).limit_denominator(1_000_000)
        self._new_rows = 0
        self._replay_rows = 0
        self._prior_rows = 0

        # An attribute of the instance counts as an override for Lightning, so exactly the hooks that the wrapped
        # datamodule has are seen, and the module keeps its own where the wrapped datamodule has none.
        for name in (*_LOADERS, *_HOOKS):
            if is_overridden(name, self.wrapped):
                setattr(self, name, getattr(self.wrapped, name))
        if self.wrapped.hparams:
            # The same object, not a copy: what tunes one of them, as `BatchSizeFinder` does, reaches the loaders.
            self._hparams = self.wrapped.hparams
        self.save_hyperparameters({"replay_fraction": replay_fraction, "replay_mode": mode})
        if prior is not None:
            self.save_hyperparameters({"replay_prior_share": prior_share})
        self.prepare_data_per_node = self.wrapped.prepare_data_per_node
        self.allow_zero_length_dataloader_with_multiple_devices = (
            self.wrapped.allow_zero_length_dataloader_with_multiple_devices
        )
        self._complete = True

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
        """Attributes that are the wrapped datamodule's alone are set there, such as the batch size that is tuned."""
        theirs = "_complete" in self.__dict__ and not (name.startswith("_") or name in self.__dict__)
        if theirs and not hasattr(type(self), name) and hasattr(self.wrapped, name):
            setattr(self.wrapped, name, value)
        else:
            super().__setattr__(name, value)

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer is not None:
            step = self.trainer.lightning_module.training_step
            if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
                raise MisconfigurationException(
                    "`training_step(dataloader_iter)` fetches its batches past the batch-transfer hooks, where replay "
                    "rows are mixed in. Write it as `training_step(batch, batch_idx)`."
                )
        if stage == "fit":
            self.new_tokens = self.replay_tokens = 0
        if stage == "fit" and self.replay_fraction and self._prior is not None and self.prior is None:
            with isolate_rng():
                self.prior = read_prior(self._prior, self.trainer)
        if stage == "fit" and self.replay_fraction and self.trainer is not None:
            self._join_processes(self.trainer)
        if stage == "fit" and self.shards is not None:
            self.refill = self._read_on
        self.wrapped.setup(stage)

    @override
    def teardown(self, stage: str) -> None:
        self.drawn = None
        self.processes.close()
        self.processes = Processes()
        self.wrapped.teardown(stage)

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.drawn = None
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
            "buffer": self.buffer.state_dict() if self.buffer is not None and self.save_buffer else None,
            "buffer_left_out": self.buffer is not None and not self.save_buffer,
            "new_rows": self._new_rows,
            "replay_rows": self._replay_rows,
            "prior_rows": self._prior_rows,
            "shards": None if self.shards is None else self.shards.state_dict(),
            # Rows can be read again; what a reference said of them can't.
            "prior": None if self.prior is None else self.prior.state_dict(rows=self.prior.top_k > 0),
            "wrapped": self.wrapped.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("buffer_left_out"):
            rank_zero_warn(
                "The checkpoint was saved with `ReplayDataModule(save_buffer=False)`, so replay rows are sampled anew, "
                "or are those that your own buffer holds: the run does not go on bit for bit as if it had not stopped."
            )
        shards = state_dict.get("shards")
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
        self._new_rows = state_dict["new_rows"]
        self._replay_rows = state_dict["replay_rows"]
        # Real prior rows came later than the other two.
        self._prior_rows = state_dict.get("prior_rows", 0)
        prior = state_dict.get("prior")
        if prior is not None and "tokens" in prior:
            self.prior = ReplayBuffer.from_state_dict(prior)
        elif prior is not None and self.prior is not None:
            self.prior.load_state_dict(prior)
        self.wrapped.load_state_dict(state_dict["wrapped"])

    def mixed(self, batch: Any) -> Any:
        """A batch of new rows with the replay rows that are due; it is called for each training batch."""
        self.drawn, self.drawn_weight = None, 1.0
        if not self.replay_fraction or (self.refill is None and not self.buffer and not self.prior):
            return batch
        total, rank = self.count(batch), self.processes.rank
        everyone = self.processes.numbers(total, token_count(batch))
        kept, takers = self._shares([count for count, _ in everyone])
        if kept[rank] < total:
            batch = crop_batch(batch, kept[rank])
        self.new_tokens += sum(
            tokens * rows // count for rows, (count, tokens) in zip(kept, everyone, strict=True) if count
        )
        if not takers:
            return batch
        rows = self._draw(len(takers), batch)
        self.replay_tokens += int(rows.lengths.sum())
        self.drawn = own = self._own(rows, takers)
        if own is None or not self.joins_batch:
            return batch
        if self.to_batch is not None:
            return _checked_mix(self.to_batch(batch, own), batch)
        return join_rows(batch, own, padding_side=self.padding_side, pad_token_id=self.pad_token_id)

    def count(self, batch: Any) -> int:
        """The number of rows in a batch of any kind that this datamodule can mix."""
        try:
            return row_count(batch)
        except TypeError:
            if self.joins_batch and self.to_batch is None:
                raise
            return nested_row_count(batch)

    def _join_processes(self, trainer: pl.Trainer) -> None:
        """Find out who trains along with us, and begin with what the first process holds."""
        self.processes = Processes.of(trainer)
        if self.processes.size == 1:
            return
        for buffer in (self.buffer, self.prior):
            state = self.processes.first(None if buffer is None else buffer.state_dict())
            if buffer is not None and state is not None:
                self.processes.together(functools.partial(buffer.load_state_dict, state))

    def _shares(self, totals: Sequence[int]) -> tuple[list[int], list[int]]:
        """How many of its new rows each process keeps, and which process takes each replay row owed."""
        total = sum(totals)
        if self.mode == "append":
            self._new_rows += total
            owed = int(self._new_rows * self._share / (1 - self._share)) - self._replay_rows
            self._replay_rows += owed
            return list(totals), _dealt(owed, [owed] * len(totals))
        if min(totals) < 2:
            raise MisconfigurationException(
                "`mode='replace'` puts replay rows in the place of new ones, but this batch has a single row. Use "
                "`mode='append'`, or larger batches."
            )
        owed = int((self._new_rows + self._replay_rows + total) * self._share) - self._replay_rows
        owed = min(owed, total - len(totals))
        self._new_rows += total - owed
        self._replay_rows += owed
        takers = _dealt(owed, [count - 1 for count in totals])
        return [count - takers.count(rank) for rank, count in enumerate(totals)], takers

    def _draw(self, rows: int, batch: Any) -> ReplayRows:
        """Draw rows, real ones as their share is and the others from the buffer."""
        parts: list[ReplayRows] = []
        real = self._real_rows(rows)
        if real:
            assert self.prior is not None
            parts.append(self.prior.draw(real))
        missing = rows - real
        while missing:
            if not self._left(missing):  # refilled just when its last row is used up
                assert self.refill is not None
                self.refill(batch)
            assert self.buffer is not None
            parts.append(self.buffer.draw(min(missing, self._left(missing))))
            missing -= len(parts[-1].tokens)
        return ReplayRows.cat(parts)

    def _read_on(self, batch: Any) -> None:
        """Put the folder's next rows in the place of the used ones, in each process the same."""
        shards = self.shards
        assert shards is not None
        rows = self.processes.together(shards.next_rows)
        assert rows.uses is not None
        if self.buffer is None:
            self.buffer = ReplayBuffer(shards.read_rows, shards.length, seed=shards.order_seed, top_k=shards.top_k_read)
        step = 0 if self.trainer is None else self.trainer.global_step
        self.buffer.add(rows, step=step, uses=rows.uses * (self.uses_per_sample or 1))

    def _own(self, rows: ReplayRows, takers: Sequence[int]) -> ReplayRows | None:
        """Those of the rows drawn for all processes that are this one's, if any."""
        if self.processes.size == 1:
            return rows
        own = torch.tensor(takers) == self.processes.rank
        targets = rows.targets_mask.sum(1)
        self.drawn_weight = self.processes.size * int(targets[own].sum()) / max(1, int(targets.sum()))
        if not own.any():
            if self.joins_batch or not self.processes.lockstep:
                return None
            own[0] = True  # of no weight, so that the model is called as often as elsewhere
        return rows.take(own)

    def _left(self, wanted: int) -> int:
        """How many of the rows wanted the buffer has to give."""
        if not self.buffer:
            return 0
        if self.refill is None or self.uses_per_sample is None:
            return wanted
        return self.buffer.left(self.uses_per_sample)

    def _real_rows(self, rows: int) -> int:
        if self.prior is None:
            return 0
        if self.refill is None and not self.buffer:
            return rows
        self._prior_rows += rows
        drawn = int((self._prior_rows - rows) * self._prior_share)
        return int(self._prior_rows * self._prior_share) - drawn


def _dealt(rows: int, room: Sequence[int]) -> list[int]:
    """The process that takes each of some rows: each in turn, for as long as it has room."""
    takers: list[int] = []
    turn = 0
    while len(takers) < rows:
        takers += [rank for rank, places in enumerate(room) if turn < places]
        turn += 1
    return takers[:rows]


def _checked_mix(mixed: Any, batch: Any) -> Any:
    """What `to_batch` returned, if `training_step` can take it where it takes the batch of new rows."""
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
