"""Probes: functions of the user's own that measure a language model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_replay.benchmarks.figures import ERROR, Figure
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.utilities.validation import is_number

__all__ = ["Probe", "check_probes", "figures_of_probe"]

Probe = Callable[[LanguageModel, Any], float | Mapping[str, float]]
"""Measures a language model, given its tokenizer, which is None if none is known."""


def check_probes(probes: Any, tasks: Sequence[str], lower_is_better: Collection[str]) -> None:
    """Refuse probes without a name of their own or that can't be called, and directions of what is no probe's.

    Raises:
        TypeError: If one is no function or has no name.
        ValueError: If a name is taken, or ``lower_is_better`` names something else.
    """
    for name, probe in probes.items():
        if not isinstance(name, str) or not callable(probe):
            raise TypeError(f"`probes` has a function under each name; got {probe!r} under {name!r}.")
        if name in (*tasks, "seconds") or "/" in name:
            raise ValueError(
                f"A probe can't be named {name!r}: its figures are logged as `benchmark/<name>`, beside those of tasks "
                "and `benchmark/seconds`, and a `/` stands before a metric."
            )
    foreign = sorted(name for name in lower_is_better if name.partition("/")[0] not in probes)
    if isinstance(lower_is_better, str) or foreign:
        raise ValueError(
            f"`lower_is_better` names figures of `probes`, as in ['loss', 'sums/errors']; got {lower_is_better!r}, and "
            f"the probes are {list(probes)}. Of tasks, it is known which way is better."
        )


def figures_of_probe(name: str, measured: Any, lower_is_better: Collection[str]) -> dict[str, Figure]:
    """The figures in what a probe returned, by name.

    Args:
        name: The probe's name.
        measured: A number, or a mapping of numbers by metric. In a mapping, the standard error of ``"accuracy"`` is
            ``"accuracy_stderr"``.
        lower_is_better: The names of figures of which a lower one is better.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> figures_of_probe("sums", {"right": 0.5, "right_stderr": 0.1}, ())
        {'sums/right': Figure(value=0.5, error=0.1, higher_is_better=True)}
    """
    given = measured if isinstance(measured, Mapping) else {"": measured}
    numbers = {metric: _number(name, value) for metric, value in given.items()}
    figures = {}
    for metric, value in numbers.items():
        if metric.endswith(ERROR) and metric.removesuffix(ERROR) in numbers:
            continue
        key = f"{name}/{metric}" if metric else name
        figures[key] = Figure(value, numbers.get(f"{metric}{ERROR}"), key not in lower_is_better)
    return figures


def _number(name: str, value: Any) -> float:
    if is_number(value) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    raise TypeError(
        f"The probe {name!r} returns a number, or a mapping of numbers by metric; got a {type(value).__name__}."
    )
