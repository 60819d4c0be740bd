"""How much lower the replay loss is on rows that have been used before."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ReuseGap"]


class _Pass(NamedTuple):
    """One use of all rows of a refill: which one, the mean loss of its batches, and the variance of that mean."""

    use: int
    mean: float
    variance: float


class ReuseGap:
    """The replay loss on rows drawn for the first time minus that on rows used again, in nats a token.

    It takes no forward of its own: the losses are those of the steps. A buffer draws each row of a refill once before
    any row again, so first and later uses alternate in passes. The gap of a refill is the mean loss over its first pass
    minus the mean over the two passes beside it: the last one of the refill before and the second of its own. So a
    trend of the loss that is linear over the three passes cancels if these are equally long. What remains:

    - A trend that bends enters with half of the second difference of the passes' means: a loss that rises or falls
      ever faster lowers or raises the gap, one that levels off from below raises it, from above lowers it.
    - It is the mean over two kinds of use, the second and the last, and not that of the last alone.

    Batches that mix rows of different uses, and passes of fewer than two batches or with a loss that is not finite, do
    not count. There is no value before the second pass of the second refill. Values of several refills are averaged,
    the newest with half of the weight.

    Attributes:
        value: The averaged gap; None before the first.
        error: Its standard error, from the spread of the losses within each pass.
        loss: The mean loss of the first pass that ``value`` came with last.
        refills: How many refills have a gap so far.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self.error = self.loss = 0.0
        self.refills = 0
        self._use = 0
        self._losses: list[Tensor] = []
        self._passes: list[_Pass] = []

    def observe(self, loss: Tensor, uses: Tensor) -> None:
        """Take the loss of a batch.

        Args:
            loss: The mean replay loss, without a graph. It is not read before the pass is over, so that a device is
                not waited for.
            uses: How often each row has been drawn, this time included.
        """
        least, most = (int(bound) for bound in uses.aminmax())
        use = least if least == most else 0
        if use != self._use:
            self._end_pass()
            self._use = use
        if use:
            self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """The gap, the passes that it will next be made of and the losses of the one under way."""
        return {
            "value": self.value,
            "error": self.error,
            "loss": self.loss,
            "refills": self.refills,
            "use": self._use,
            "losses": [float(loss) for loss in self._losses],
            "passes": [tuple(one) for one in self._passes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self.value, self.error, self.loss, self.refills = (state[key] for key in ("value", "error", "loss", "refills"))
        self._use = state["use"]
        self._losses = [torch.tensor(loss, dtype=torch.float64) for loss in state["losses"]]
        self._passes = [_Pass(*one) for one in state["passes"]]

    def _end_pass(self) -> None:
        losses, self._losses = self._losses, []
        if len(losses) < 2:
            # A batch that mixes two uses lies between their passes; a pass of one batch has no spread.
            self._passes = self._passes if not losses else []
            return
        device = losses[-1].device  # those of a checkpoint are on the CPU
        values = torch.stack([loss.to(device, torch.float64) for loss in losses]).cpu()
        if not values.isfinite().all():  # as of a step that overflowed: the average would never be a number again
            self._passes = []
            return
        self._passes.append(_Pass(self._use, float(values.mean()), float(values.var()) / len(losses)))
        self._passes = self._passes[-3:]
        if len(self._passes) == 3:
            self._compare(*self._passes)

    def _compare(self, before: _Pass, first: _Pass, after: _Pass) -> None:
        if not before.use > first.use == 1 < after.use:
            return
        gap = first.mean - (before.mean + after.mean) / 2
        variance = first.variance + (before.variance + after.variance) / 4
        if self.value is not None:
            gap, variance = (self.value + gap) / 2, (self.error**2 + variance) / 4
        self.value, self.error, self.loss = gap, math.sqrt(variance), first.mean
        self.refills += 1
