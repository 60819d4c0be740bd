"""Whether a figure falls while it is measured, without keeping its values or reading them from the device."""

import math

import torch
from torch import Tensor

__all__ = ["Trend"]


class Trend:
    """The mean of the first values against that of all later ones: of the first 3, 7, 15, ..., where it is clearest.

    So an early, steep fall is found as well as a long, slow one.

    Example:
        >>> trend = Trend()
        >>> for value in [3.0, 2.9, 3.1] + [1.0, 1.1, 0.9, 1.0] * 4:
        ...     trend.add(torch.tensor(value))
        >>> fall, error = trend.fall()
        >>> round(fall, 3), round(error, 3)
        (2.0, 0.053)
    """

    def __init__(self) -> None:
        self.steps = 0
        self._means: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Take the next value, a scalar."""
        self.steps += 1
        value = value.detach().to(torch.float32)
        count = self.steps - 2 ** (self.steps.bit_length() - 1) + 1
        if count == 1:
            self._means.append(torch.zeros_like(value))
            self._squares.append(torch.zeros_like(value))
        before = value - self._means[-1]
        self._means[-1] = self._means[-1] + before / count
        self._squares[-1] = self._squares[-1] + before * (value - self._means[-1])

    def fall(self) -> tuple[float, float]:
        """By how much the mean falls where that is clearest, of at least eight values, and the standard error."""
        counts = [2**part for part in range(len(self._means))]
        counts[-1] = self.steps - sum(counts[:-1])
        variance = sum(map(float, self._squares)) / (self.steps - len(counts))
        sums = [count * float(mean) for count, mean in zip(counts, self._means, strict=True)]
        tried = []
        for part in range(2, len(counts)):
            first, later = sum(counts[:part]), sum(counts[part:])
            fall = sum(sums[:part]) / first - sum(sums[part:]) / later
            tried.append((fall, math.sqrt(variance * (1 / first + 1 / later))))
        return max(tried, key=lambda each: each[0] / each[1] if each[1] else each[0])
