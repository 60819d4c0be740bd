"""Drawing the replay rows that go with each batch of new rows."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.data.batches import rows_in, token_count
from lightning_replay.data.share import ReplayShare
from lightning_replay.data.sources import RowSource
from lightning_replay.utilities.distributed import Processes

__all__ = ["RowFeed"]


class RowFeed:
    """Draws replay rows from a source, in the right share, and deals them to the ranks.

    A ``ReplayDataModule`` has one; without a datamodule, ``SelfGeneratedReplay`` has one of its own.

    Args:
        share: How many rows are owed to each batch.

    Attributes:
        source: Where rows come from; None if there are no rows.
        joins_batch: Whether drawn rows join the user's batch. If not, the callback sees to their own forward.
        every_n_steps: Rows go only with the batches of every so many optimizer steps: those of all steps since the last
            time, divided evenly among the batches of the step.
        drawn: This rank's replay rows of the batch that was last made ready for training, on the CPU; None if it has
            none.
        weight: What to multiply the mean loss on ``drawn`` by, so that the average over all ranks is the mean over the
            target tokens of all, times the number of batches that the rows belong to.
        new_tokens: Tokens of new rows in this fit, padding included, on all ranks; 0 for batches of an unknown kind.
        replay_tokens: Tokens of replay rows in this fit, on all ranks.
        processes: The processes of the fit.
    """

    def __init__(self, share: ReplayShare) -> None:
        self.share = share
        self.source: RowSource | None = None
        self.joins_batch = True
        self.every_n_steps = 1
        self.drawn: ReplayRows | None = None
        self.weight = 1.0
        self.new_tokens = 0
        self.replay_tokens = 0
        self.processes = Processes()
        self._trainer: pl.Trainer | None = None
        self._warned = False

    def attach(self, source: RowSource, joins_batch: bool = False) -> Callable[[], None]:
        """Draw rows from a source.

        Args:
            source: The source.
            joins_batch: Whether drawn rows join the user's batch.

        Returns:
            A function that detaches the source.
        """
        self.source, self.joins_batch = source, joins_batch

        def detach() -> None:
            self.source = self.drawn = None

        return detach

    def begin(self, trainer: pl.Trainer) -> None:
        """Prepare for a fit; all of its processes call this.

        Raises:
            MisconfigurationException: If ``training_step`` takes an iterator of batches, or ranks share a batch.
        """
        step = trainer.lightning_module.training_step
        if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                "Replay rows go with batches, but `training_step(dataloader_iter)` fetches its batches itself. Write "
                "it as `training_step(batch, batch_idx)`."
            )
        self.new_tokens = self.replay_tokens = 0
        self._trainer, self._warned = trainer, False
        self.share.drop_held()  # of a fit before, which ended between two times
        if self.share.fraction:
            self.processes = Processes.of(trainer)

    def end(self) -> None:
        """Leave the fit."""
        self.drawn = self._trainer = None
        self.processes.close()
        self.processes = Processes()

    def next(self, batch: Any, count: Callable[[Any], int] = rows_in) -> int | None:
        """Draw the rows that go with a batch of new rows; they are in ``drawn`` afterwards.

        Args:
            batch: The batch.
            count: Returns the number of new rows in a batch.

        Returns:
            The number of new rows that stay in the batch; None for all of them.
        """
        self.drawn, self.weight = None, 1.0
        if not self.share.fraction or self.source is None or self.source.is_empty:
            return None
        self.source.prepare(batch)
        rows = count(batch)
        everyone = self.processes.gather_ints(rows, token_count(batch))
        kept, takers, batches = self.share.deal([total for total, _ in everyone], self._carriers())
        self.new_tokens += sum(
            tokens * stay // total for stay, (total, tokens) in zip(kept, everyone, strict=True) if total
        )
        if takers:
            self.weight *= batches
            self._warn_of_clipping(batches)
            drawn = self.source.draw(len(takers), batch)
            self.replay_tokens += int(drawn.lengths.sum())
            self.drawn = self._own(drawn, takers)
        stays = kept[self.processes.rank]
        return stays if stays < rows else None

    def _carriers(self) -> int:
        """How many batches, from the next one on, replay rows go with in this optimizer step; 0 for a step without."""
        if self.every_n_steps == 1:
            return 1
        trainer = self._trainer
        assert trainer is not None
        if (trainer.global_step + 1) % self.every_n_steps:
            return 0
        # Not `ready`: this runs before or after Lightning counts the batch, with and without a datamodule of ours.
        done, accumulated = (
            trainer.fit_loop.epoch_loop.batch_progress.current.completed,
            trainer.accumulate_grad_batches,
        )
        left = accumulated - done % accumulated
        return int(min(left, max(1, trainer.num_training_batches - done)))  # an epoch's last step may have fewer

    def _warn_of_clipping(self, batches: int) -> None:
        """Warn once if the gradient of rows that stand for the batches of several steps is clipped as that of one."""
        trainer = self._trainer
        if trainer is None or not trainer.gradient_clip_val or self.joins_batch or self._warned:
            return
        if batches >= 2 * trainer.accumulate_grad_batches:
            self._warned = True
            rank_zero_warn(
                f"`gradient_clip_val={trainer.gradient_clip_val}` can weaken replay: the replay rows of "
                f"this batch stand for {batches} batches, so their gradient is {batches} times as large, and each "
                "step is clipped by itself. Use larger batches, more of them in a step "
                "(`accumulate_grad_batches`), a higher `replay_fraction`, a lower `every_n_steps`, or no clipping."
            )

    def _own(self, rows: ReplayRows, takers: list[int]) -> ReplayRows | None:
        """Those of the rows drawn for all ranks that are this one's, if any."""
        if self.processes.size == 1:
            return rows
        own = torch.tensor(takers) == self.processes.rank
        targets = rows.targets_mask.sum(1)
        self.weight *= self.processes.size * int(targets[own].sum()) / max(1, int(targets.sum()))
        if not own.any():
            if self.joins_batch or not self.processes.lockstep:
                return None
            own[0] = True  # of no weight, so that this rank calls the model as often as the others
        return rows.take(own)
