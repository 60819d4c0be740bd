import math
import random
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean

import pytest
from scipy.stats import linregress

from lightning_replay.callbacks.verdict import Course, verdict


def course(loss: Callable[[int], float], steps: int = 1000, noise: float = 0.0) -> Course:
    chance, found = random.Random(0), Course()
    for step in range(steps):
        found.add(loss(step) + chance.gauss(0, noise))
    return found


def test_means_are_over_equally_many_values() -> None:
    values = [float(step) for step in range(2048)]
    found = course(lambda step: values[step], len(values))
    # 2,048 values are 64 means of 32, joined to 32 of 64.
    assert found.state_dict()["means"] == [fmean(values[start : start + 64]) for start in range(0, 2048, 64)]
    assert found.total_gain == 0.0  # it has risen
    assert course(lambda step: -values[step], 2048).total_gain == pytest.approx(fmean(values[1536:]))


def test_the_trend_is_the_line_by_least_squares_and_its_error() -> None:
    found = course(falling, 63, noise=0.1)
    gain = found.gain()
    assert gain is not None
    lines = []
    for first in (15, 31):
        x, means = [math.log(step + 0.5) for step in range(first, 63)], found.state_dict()["means"][first:]
        line = linregress(x, means)
        left = [mean - line.intercept - line.slope * place for mean, place in zip(means, x, strict=True)]
        rho = max(0.0, sum(a * b for a, b in pairwise(left)) / sum(a * a for a in left))
        error = 2 * line.stderr * math.log(2) * math.sqrt((1 + rho) / (1 - rho))
        lines.append((-line.slope * math.log(2), error))
    early, late = lines
    assert gain == pytest.approx(late if sum(late) < early[0] else early)


def test_a_loss_is_not_told_to_fall_below_zero_nor_as_it_did_before_it_levelled_off() -> None:
    near_zero = course(lambda step: 0.02 + max(0.0, 1.0 - step / 900)).gain()
    assert near_zero is not None
    assert near_zero.fall <= 0.03
    level = course(lambda step: 0.16 + 0.5 * math.exp(-step / 150)).gain()
    assert level is not None
    assert level.fall < 0.03  # 0.0006 are left


@pytest.mark.parametrize("steps", [0, 1, 15, 16, 63, 64, 65, 127, 128, 1000, 12345])
def test_a_course_holds_few_means_and_goes_on_from_its_state(steps: int) -> None:
    straight = course(float, steps + 77)
    saved = course(float, steps)
    assert len(saved.state_dict()["means"]) < 64
    resumed = Course()
    resumed.load_state_dict(saved.state_dict())
    for step in range(steps, steps + 77):
        resumed.add(float(step))
    assert resumed.state_dict() == straight.state_dict()


def test_values_that_are_no_numbers_are_left_out() -> None:
    found = course(lambda step: math.nan if step % 2 else 1.0 + step)
    assert found.first == 1.0
    assert found.state_dict()["means"] == course(lambda step: 1.0 + 2 * step, 500).state_dict()["means"]


def falling(step: int) -> float:
    return 6.0 - 0.3 * math.log(step + 1)


def stalled(step: int) -> float:
    return 3.0 + 3.0 * math.exp(-step / 30)


@pytest.mark.parametrize(
    ("loss", "noise", "binds", "gain", "words"),
    [
        (falling, 0.05, True, 0.1, "in twice the steps it would fall by about"),
        (falling, 0.05, False, None, "in twice the steps it would fall by about"),
        (stalled, 0.05, True, 0.2, "Use a larger budget, or a larger model"),
        (stalled, 0.05, True, None, "Use a larger budget, or a larger model"),
        (stalled, 0.05, True, 0.01, "nothing is needed"),
        (stalled, 0.05, False, None, "a larger budget would not either"),
        (stalled, 3.0, True, 0.2, "It can't be told"),
        (falling, 3.0, True, 0.2, "It can't be told"),
    ],
)
def test_what_would_help_is_told_from_the_course_and_the_price(
    loss: Callable[[int], float], noise: float, binds: bool, gain: float | None, words: str
) -> None:
    assert words in verdict(course(loss, noise=noise), binds, gain).sentence


def test_twice_the_steps_bring_what_is_foretold_if_the_loss_falls_with_their_logarithm() -> None:
    told = float(verdict(course(falling), True, None).sentence.split("about ")[1].rstrip("."))
    assert told == pytest.approx(falling(1000) - falling(2000), rel=0.05)


def test_of_a_short_run_nothing_is_told() -> None:
    assert verdict(course(falling, 10), True, 0.1).helps == "unknown"
