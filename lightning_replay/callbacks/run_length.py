"""How long a fit is: its optimizer steps, and the replay rows that it draws."""

import math
from typing import Any

import lightning.pytorch as pl

from lightning_replay.data.batches import rows_in
from lightning_replay.data.feed import RowFeed
from lightning_replay.data.replay import ReplayDataModule

__all__ = ["rows_of_the_run", "steps_of_the_run"]


def steps_of_the_run(trainer: pl.Trainer) -> int | None:
    """The number of optimizer steps of the whole fit, if its length is known; to be asked while it trains."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    batches = float(trainer.num_training_batches)
    in_epoch = batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
    total = min(in_epoch * epochs, steps)
    return None if math.isinf(total) else int(total)


def rows_of_the_run(trainer: pl.Trainer, feed: RowFeed, data: ReplayDataModule | None, batch: Any) -> int | None:
    """How many sampled rows the whole fit will draw, on all ranks, if its length is known."""
    steps = steps_of_the_run(trainer)
    if steps is None:
        return None
    total = float(steps * trainer.accumulate_grad_batches)
    if trainer.max_epochs not in (None, -1):
        total = min(total, trainer.num_training_batches * float(trainer.max_epochs or 0))
    # Rows of a last cycle of `every_n_steps` that is not completed are never drawn.
    whole = steps - steps % feed.every_n_steps
    counts = feed.processes.gather_ints(-(-int(total) * whole // max(1, steps)), rows_in(batch))
    new_rows = max(batches for batches, _ in counts) * sum(rows for _, rows in counts)
    real = 0.0 if data is None or data.prior is None else data.prior_share
    return max(1, math.ceil(round(feed.share.replay_rows(new_rows) * (1 - real), 6)))
