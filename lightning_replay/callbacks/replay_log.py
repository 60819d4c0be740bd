"""What a run with replay logs, and the line that it ends with."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_replay.callbacks.refill import SampledRows
from lightning_replay.callbacks.training_step import ReplayStep
from lightning_replay.data.feed import RowFeed
from lightning_replay.data.sources import RowSource
from lightning_replay.utilities.logging import log_values, next_step

__all__ = ["ReplayLog"]


class ReplayLog:
    """Logs what replay does at each step, and sums it up.

    Args:
        step: Adds the replay loss.
        rows: The sampled rows.

    Attributes:
        of_last_rows: The uses and the age of the last rows that were drawn, by key.
    """

    def __init__(self, step: ReplayStep, rows: SampledRows) -> None:
        self._step = step
        self._rows = rows
        self._began, self._rows_before = (0.0, 0.0, 0.0), 0
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.of_last_rows: dict[str, float] = {}
        self.begin_epoch()

    def begin_training(self) -> None:
        """Count time and sampled rows from here."""
        self._began, self._rows_before = self._seconds_so_far(), self._rows.generator.rows

    def begin_epoch(self) -> None:
        """Log all values again: Lightning keeps what was logged last within an epoch alone."""
        self._logged: dict[str, Any] = {}

    def write(self, pl_module: pl.LightningModule, feed: RowFeed, drawn_from: RowSource | None) -> None:
        """Log the values of the step that has ended.

        Args:
            pl_module: The module, whose ``log_dict`` is used.
            feed: Draws the replay rows.
            drawn_from: Where it draws them from; None for a loss on the new rows.
        """
        step = self._step
        values: dict[str, Any] = {}
        if step.last_loss is not None:
            values |= {
                "replay/loss": step.last_loss,
                "replay/coefficient": step.last_coefficient,
                "replay/loss_seconds": step.seconds,
            }
        if drawn_from is not None:
            values |= drawn_from.measures()
            drawn = feed.drawn
            if drawn is not None and drawn.uses is not None and drawn.steps is not None:
                self.of_last_rows = {
                    "replay/uses": float(drawn.uses.double().mean()),
                    "replay/age": pl_module.trainer.global_step - float(drawn.steps.double().mean()),
                }
            values |= self.of_last_rows
        if step.budget is not None:
            values |= step.budget.values()
        if step.reuse_gap.value is not None:
            values["replay/reuse_gap"] = step.reuse_gap.value
        # Each `log` takes longer than all else here.
        changed = {key: value for key, value in values.items() if not _same(value, self._logged.get(key))}
        self._logged |= changed
        # As tensors on the CPU: Lightning would move each number to the device and wait for it.
        tensors = {
            key: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
            for key, value in changed.items()
        }
        pl_module.log_dict(tensors, on_step=True, on_epoch=False, batch_size=1)

    def end(self, trainer: pl.Trainer) -> None:
        """Log the values of the last step, unless Lightning has: a short run may have had no logging step."""
        step, every = next_step(trainer), trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every:
            log_values(trainer, {key: float(value) for key, value in self._logged.items()}, step)

    def summary(self, feed: RowFeed | None, monitoring_seconds: float) -> str:
        """Where the time of the fit went, in a line.

        Args:
            feed: Drew the replay rows; None for a loss on the new rows.
            monitoring_seconds: What the monitors took.
        """
        total, sampling, loss = (now - then for now, then in zip(self._seconds_so_far(), self._began, strict=True))
        line = f"Replay: of {total:,.1f} s, {loss / total:.1%} went into the replay loss (without its backward)"
        if feed is not None:
            line += (
                f", {sampling / total:.1%} into sampling {self._rows.tokens_since(self._rows_before):,} tokens; "
                f"trained on {feed.new_tokens:,} new and {feed.replay_tokens:,} replayed tokens"
            )
        return f"{line}; monitoring took {monitoring_seconds / total:.1%}."

    def _seconds_so_far(self) -> tuple[float, float, float]:
        """Of the clock, in sampling, and in the replay loss."""
        return time.perf_counter(), self._rows.generator.seconds, self._step.seconds


def _same(value: Any, other: Any) -> bool:
    """Whether two values are one number, or one tensor, which is not read."""
    return value is other or (isinstance(value, float) and value == other)
