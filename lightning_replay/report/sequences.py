"""Joining the fits of a sequence of tasks to one run, and the matrix of their results.

One rule says what belongs together: *a fit continues the one that ended where it begins*. At its first measurement,
which is before its first step, every prior set that both measured has the loss that the other fit measured last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import isclose
from pathlib import PurePosixPath

from lightning_replay.report.run_logs import MONITOR_SECONDS, OWN_SAMPLES, RunLog

__all__ = ["SINCE_START", "Matrix", "joined", "matrix_of"]

SINCE_START = ("replay/sampling_seconds", "replay/loss_seconds", MONITOR_SECONDS)
"""Keys that count from fit start on; those of a sequence are added up."""
_LOSS, _ACCURACY, _FORGETTING = "prior_loss/", "prior_accuracy/", "forgetting/"
_SAME = 1e-5
"""Losses of the same weights on the same rows differ by less, relatively: loggers may keep 32-bit floats."""


def joined(runs: Sequence[RunLog]) -> list[RunLog]:
    """Runs, with the fits of each sequence joined to one.

    If several fits continue the same one, each of them is the end of a sequence of its own, and they share its
    beginning.

    Args:
        runs: What each fit logged, in natural order of their folders.
    """
    earlier: dict[str, RunLog] = {}
    for run in runs:
        chains = [chain for chain in (_chain(other, earlier) for other in runs) if run not in chain]
        candidates = [chain[-1] for chain in chains if _continues(run, chain[-1])]
        if candidates:
            earlier[run.name] = max(candidates, key=lambda other: _nearness(runs, run, other))
    continued = {run.name for run in earlier.values()}
    chains = [_chain(run, earlier) for run in runs if run.name not in continued]
    names = {run.name for run in runs}
    short = [_name(chain, names) for chain in chains]
    long = [f"{chain[0].name} → {chain[-1].name}" for chain in chains]
    unique = [name if short.count(name) == 1 else other for name, other in zip(short, long, strict=True)]
    return [chain[0] if len(chain) == 1 else _join(name, chain) for chain, name in zip(chains, unique, strict=True)]


def _continues(run: RunLog, other: RunLog) -> bool:
    """Whether a fit begins where another ended, which must have changed something since it began itself."""
    keys = [
        key
        for key, series in run.values.items()
        if key.startswith(_LOSS) and key != _LOSS + OWN_SAMPLES and key in other.values and min(series) == 0
    ]
    return (
        bool(keys)
        and all(_same(run.first(key), other.last(key)) for key in keys)
        and not all(_same(other.first(key), other.last(key)) for key in keys)
    )


def _same(first: float | None, second: float | None) -> bool:
    return first is not None and second is not None and isclose(first, second, rel_tol=_SAME)


def _chain(run: RunLog, earlier: Mapping[str, RunLog]) -> list[RunLog]:
    """A fit and those before it, the first one first."""
    chain = [run]
    while chain[0].name in earlier:
        chain.insert(0, earlier[chain[0].name])
    return chain


def _nearness(runs: Sequence[RunLog], run: RunLog, other: RunLog) -> tuple[int, bool, int]:
    """Sort key for fits that ended alike, as repeated ones do: the folders shared, then the last one before the run."""
    parts = zip(*(PurePosixPath(each.name).parts for each in (run, other)), strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], parts)))
    return shared, runs.index(other) < runs.index(run), runs.index(other)


def _name(chain: Sequence[RunLog], names: set[str]) -> str:
    """The folder of the last fit, if it holds no other sequence's fit; else the names of the first and the last fit."""
    folder = PurePosixPath(chain[-1].name).parent
    inside = {name for name in names if folder in PurePosixPath(name).parents}
    if folder.name and folder.as_posix() not in names and inside <= {fit.name for fit in chain}:
        return folder.as_posix()
    return f"{chain[0].name} → {PurePosixPath(chain[-1].name).name}"


def _join(name: str, fits: Sequence[RunLog]) -> RunLog:
    """Draw fits one after another: steps and seconds add up, and forgetting counts from where a set was learned."""
    run = RunLog(name, fits=list(fits))
    steps = 0
    for fit in fits:
        for key, series in fit.values.items():
            spent = (run.last(key) or 0.0) if key in SINCE_START else 0.0
            run.add(key, [(steps + step, spent + value) for step, value in series.items()])
        run.samples |= {steps + step: texts for step, texts in fit.samples.items()}
        run.notes += fit.notes
        steps += fit.steps
    matrix = matrix_of(run)
    for name, row in zip(matrix.sets, matrix.learned, strict=True) if matrix else ():
        learned_at = sum(fit.steps for fit in fits[:row])
        losses = {step: loss for step, loss in run.values[_LOSS + name].items() if step >= learned_at}
        start = losses[min(losses)]
        run.values[_FORGETTING + name] = {step: loss - start for step, loss in losses.items()}
    return run


@dataclass(frozen=True)
class Matrix:
    """The results of a sequence: the accuracy on each prior set before the first fit and after each one.

    Attributes:
        rows: Names of the rows.
        sets: Names of the columns, in the order in which they were learned.
        accuracy: The accuracy in each row; None if it was not measured.
        learned: The row in which each set had been learned. The set that a fit learned is the one whose loss fell the
            most in it, to the lowest so far; a set that no fit learned was known when it was first measured.
    """

    rows: list[str]
    sets: list[str]
    accuracy: list[list[float | None]]
    learned: list[int]

    @property
    def average_accuracy(self) -> float:
        """Mean accuracy over all sets after the last fit (Lopez-Paz & Ranzato 2017)."""
        final = [value for value in self.accuracy[-1] if value is not None]
        return sum(final) / len(final)

    @property
    def backward_transfer(self) -> float | None:
        """Mean change from after a set was learned to the end, without sets that the last fit learned (ditto)."""
        last = len(self.accuracy) - 1
        pairs = [
            (self.accuracy[row][column], self.accuracy[last][column])
            for column, row in enumerate(self.learned)
            if row < last
        ]
        changes = [end - start for start, end in pairs if start is not None and end is not None]
        return sum(changes) / len(changes) if changes else None


def matrix_of(run: RunLog) -> Matrix | None:
    """The matrix of a sequence; None if the run is one fit, or no set's accuracy was measured in the last one.

    A set of the model's own samples is left out, because each fit samples it anew.
    """
    if not run.fits:
        return None
    names = [name for name in run.prior_sets if name != OWN_SAMPLES and _ACCURACY + name in run.fits[-1].values]
    if not names:
        return None
    ends = list(zip([None, *run.fits], [*run.fits, None], strict=True))
    cells = {name: [_between(*fits, _ACCURACY + name) for fits in ends] for name in names}
    losses = {name: [_between(*fits, _LOSS + name) for fits in ends] for name in names}
    learned = {name: next(row for row, cell in enumerate(cells[name]) if cell is not None) for name in names}
    most = dict.fromkeys(names, 0.0)
    for row in range(1, len(ends)):
        falls = {name: _fall(losses[name][: row + 1]) for name in names}
        name = max(falls, key=lambda name: falls[name])
        if falls[name] > most[name]:
            most[name], learned[name] = falls[name], row
    names.sort(key=lambda name: learned[name])
    titles = ["at the start", *(f"after {PurePosixPath(fit.name).name}" for fit in run.fits)]
    return Matrix(
        titles, names, list(map(list, zip(*(cells[name] for name in names), strict=True))), [learned[n] for n in names]
    )


def _between(before: RunLog | None, after: RunLog | None, key: str) -> float | None:
    """The value at the end of one fit and the start of the next."""
    value = None if before is None else before.last(key)
    return after.first(key) if value is None and after is not None else value


def _fall(losses: Sequence[float | None]) -> float:
    """The fall of a loss over the last of some rows; 0 if it was lower before, because a recovery is no learning."""
    before = [loss for loss in losses[:-1] if loss is not None]
    if losses[-1] is None or losses[-2] is None or losses[-1] > min(before):
        return 0.0
    return losses[-2] - losses[-1]
