import math

import numpy as np
import pytest
import torch

from lightning_replay.models.trend import Trend


def trend_of(values: np.ndarray) -> tuple[float, float]:
    trend = Trend()
    for value in values:
        trend.add(torch.tensor(value))
    return trend.fall()


@pytest.mark.parametrize("steps", [8, 15, 16, 200])
def test_the_fall_is_the_difference_of_means_that_is_most_standard_errors(steps: int) -> None:
    values = 4.0 - 0.2 * np.log(np.arange(1, steps + 1)) + np.random.default_rng(0).normal(0, 0.1, steps)
    ends = [end for end in (3, 7, 15, 31, 63, 127) if end < steps]
    parts = np.split(values, [1, *ends])
    variance = sum(part.var() * len(part) for part in parts) / (steps - len(parts))
    errors = [math.sqrt(variance * (1 / end + 1 / (steps - end))) for end in ends]
    falls = [values[:end].mean() - values[end:].mean() for end in ends]
    assert trend_of(values) == pytest.approx(max(zip(falls, errors, strict=True), key=lambda x: x[0] / x[1]), rel=1e-4)


@pytest.mark.parametrize("steps", [100, 3000])
def test_a_loss_that_falls_in_its_first_steps_alone_has_fallen(steps: int) -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, steps)
    fall, error = trend_of(1.0 + 3.0 * np.exp(-np.arange(steps) / 2) + noise)
    assert 1.5 < fall < 3.0
    assert fall > 5 * error


def test_a_loss_that_falls_slowly_has_fallen() -> None:
    fall, error = trend_of(4.0 - 0.5 * np.arange(1000) / 1000 + np.random.default_rng(0).normal(0, 0.5, 1000))
    assert fall == pytest.approx(0.25, abs=0.1)
    assert fall > 5 * error


def test_values_that_are_all_the_same_have_not_fallen() -> None:
    assert trend_of(np.full(64, 0.1)) == (0.0, 0.0)


def test_level_noise_is_seldom_taken_for_a_fall() -> None:
    found = 0
    for seed in range(400):
        fall, error = trend_of(np.random.default_rng(seed).normal(5, 0.3, 64))
        found += fall > 2 * error
    assert 1 <= found <= 60  # 2.5% for each of four comparisons at most, give or take
