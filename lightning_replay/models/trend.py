"""Whether a figure falls while it is measured, without keeping its values or reading them from the device."""

import math

import torch
from torch import Tensor

__all__ = ["Trend"]


class Trend:
    """A straight line over the logarithm of the steps, by least squares, which losses follow better than the steps.

    Example:
        >>> trend = Trend()
        >>> for step in range(100):
        ...     trend.add(torch.tensor(3.0 - 0.1 * math.log(step + 1)))
        >>> fall, error = trend.fall()
        >>> round(fall, 3), error < 1e-3
        (0.461, True)
    """

    def __init__(self) -> None:
        self.steps = 0
        self._x = self._xx = 0.0
        self._y = self._xy = self._yy = torch.zeros((), dtype=torch.float32)

    def add(self, value: Tensor) -> None:
        """Take the next value, a scalar."""
        self.steps += 1
        x, y = math.log(self.steps), value.detach().to(torch.float32)
        if self.steps == 1:
            self._y, self._xy, self._yy = y, torch.zeros_like(y), torch.zeros_like(y)
            return
        before_x, before_y = x - self._x, y - self._y
        self._x += before_x / self.steps
        self._y = self._y + before_y / self.steps
        self._xx += before_x * (x - self._x)
        self._xy = self._xy + (x - self._x) * before_y
        self._yy = self._yy + before_y * (y - self._y)

    def fall(self) -> tuple[float, float]:
        """By how much the line falls from the first value to the last, of at least three, and the standard error."""
        slope = float(self._xy) / self._xx
        left = max(0.0, float(self._yy) - slope * float(self._xy))
        error = math.sqrt(left / (self.steps - 2) / self._xx)
        return -slope * math.log(self.steps), error * math.log(self.steps)
