import numpy as np
import pytest
import torch

from lightning_replay.models.trend import Trend


def test_the_fall_is_that_of_least_squares_over_the_logarithm_of_the_steps() -> None:
    steps = np.arange(1, 201)
    values = 4.0 - 0.2 * np.log(steps) + np.random.default_rng(0).normal(0, 0.1, len(steps))
    trend = Trend()
    for value in values:
        trend.add(torch.tensor(value))
    (slope, _), covariance = np.polyfit(np.log(steps), values, 1, cov=True)
    expected = -slope * np.log(200), np.sqrt(covariance[0, 0]) * np.log(200)
    assert trend.fall() == pytest.approx(expected, rel=1e-3)


def test_level_noise_is_taken_for_a_fall_no_more_often_than_two_standard_errors_say() -> None:
    found = 0
    for seed in range(400):
        values = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 0.3 + 5
        trend = Trend()
        for value in values:
            trend.add(value)
        fall, error = trend.fall()
        found += fall > 2 * error
    assert 1 <= found <= 20  # 2.5% of 400, give or take
