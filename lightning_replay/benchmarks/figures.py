"""What benchmarks measure: figures with their standard error, and which way is better."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from lightning_replay.utilities.validation import is_number

__all__ = ["ERROR", "Figure", "drop", "figures_of_tasks", "jackknife_error"]

T = TypeVar("T")

ERROR = "_stderr"
"""What the name of a standard error ends with, in the harness and in what a probe returns."""
_PARTS = 100
"""How many figures a standard error is made of at most, by leaving out a part of the documents for each."""


class Figure(NamedTuple):
    """A measured figure.

    Attributes:
        value: The figure.
        error: Its standard error; None if it is not known.
        higher_is_better: Whether a higher figure is a better one; None if it is not known.
    """

    value: float
    error: float | None = None
    higher_is_better: bool | None = True


def drop(figure: Figure, baseline: float) -> float | None:
    """By how much a figure is worse than it was; None if it is not known which way is better.

    Example:
        >>> drop(Figure(0.5), baseline=0.75), drop(Figure(3.0, higher_is_better=False), baseline=2.0)
        (0.25, 1.0)
    """
    if figure.higher_is_better is None:
        return None
    return baseline - figure.value if figure.higher_is_better else figure.value - baseline


def jackknife_error(aggregate: Callable[[list[T]], float], values: Sequence[T]) -> float:
    """The standard error of a figure of some documents, from the figures without a part of them at a time.

    Each document is left out once, alone if there are up to 100 (Efron and Tibshirani 1993, An Introduction to the
    Bootstrap, chapter 11).

    Args:
        aggregate: Makes the figure of the values of any documents.
        values: The value of each document, at least two.

    Example:
        >>> round(jackknife_error(lambda values: sum(values) / len(values), [1.0, 2.0, 3.0]), 6)  # as of a mean
        0.57735
    """
    parts = min(len(values), _PARTS)
    without = [
        aggregate([value for place, value in enumerate(values) if place % parts != part]) for part in range(parts)
    ]
    mean = sum(without) / parts
    return math.sqrt((parts - 1) / parts * sum((figure - mean) ** 2 for figure in without))


def figures_of_tasks(results: Mapping[str, Any], asked: Sequence[str]) -> dict[str, Figure]:
    """The figures in the harness's results, as ``<task>/<metric>``, with the filter as a third part if there is one.

    Of a group of tasks that has figures of its own, those are taken; of any other, those of its tasks.

    Args:
        results: What the harness's ``evaluate`` returned.
        asked: The names that were asked for.

    Example:
        >>> metrics = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "match,strict": 0.2}
        >>> results = {"results": {"arc": metrics}, "higher_is_better": {"arc": {"acc": True}}}
        >>> figures_of_tasks(results, ["arc"])["arc/acc"]
        Figure(value=0.5, error=0.1, higher_is_better=True)
        >>> figures_of_tasks(results, ["arc"])["arc/match/strict"]
        Figure(value=0.2, error=None, higher_is_better=None)
    """
    figures: dict[str, Figure] = {}
    for task in _shown(results, asked):
        directions = results["higher_is_better"].get(task, {})
        metrics = results["results"][task]
        for key, value in metrics.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith(ERROR) or not is_number(value):
                continue
            error = metrics.get(f"{metric}{ERROR},{filter_}")
            name = f"{task}/{metric}" if filter_ == "none" else f"{task}/{metric}/{filter_}"
            figures[name] = Figure(float(value), float(error) if is_number(error) else None, directions.get(metric))
    return figures


def _shown(results: Mapping[str, Any], asked: Sequence[str]) -> Iterator[str]:
    """The tasks to show, in the order of the results."""
    members = results.get("group_subtasks", {})
    hidden: set[str] = set()
    for group in results.get("groups", {}):
        hidden |= set(_below(members, group))
    for task in results["results"]:
        if task in asked or task not in hidden:
            yield task


def _below(members: Mapping[str, Sequence[str]], group: str) -> Iterator[str]:
    for member in members.get(group, ()):
        yield member
        yield from _below(members, member)
