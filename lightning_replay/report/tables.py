"""The report's tables: the final figures that matter first, all the others, and the matrix of each sequence."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isnan

from lightning_replay.report.run_logs import OWN_SAMPLES, RunLog
from lightning_replay.report.sequences import Matrix

__all__ = ["Table", "all_figures", "final_figures", "matrix_table"]

_SETS_AT_MOST = 4
"""Sets with a column of their own in the first table; of more, it has the mean and the worst."""


@dataclass(frozen=True)
class _Column:
    """One figure of each run; ``best`` selects the one to print in bold.

    If it is the difference between the first and the last of figures with standard errors, ``error`` is their key.
    """

    title: str
    value: Callable[[RunLog], float | None]
    shown: str = ".3f"
    best: Callable[[Iterable[float]], float] | None = min
    error: str | None = None


@dataclass(frozen=True)
class _Cell:
    value: float | None
    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        title: Its caption.
        columns: Titles of its columns.
        rows: The cells of each row, by the row's name.
        of_runs: Whether each row is a run.
        note: What is below it.
    """

    title: str
    columns: list[str]
    rows: dict[str, list[_Cell]]
    of_runs: bool = True
    note: str = ""


def final_figures(
    runs: Sequence[RunLog], sets: Sequence[str], new_loss: str, seconds: Iterable[str], matrices: Mapping[str, Matrix]
) -> Table:
    """The figures that matter most: what was kept, what was learned and what it took.

    Args:
        runs: The runs.
        sets: Names of the prior sets.
        new_loss: Key of the new task's loss.
        seconds: Keys of the time that replay and monitoring took.
        matrices: The matrix of each sequence, by the run's name.
    """
    keys = [f"forgetting/{name}" for name in sets]
    of_text = [key for key, name in zip(keys, sets, strict=True) if name != OWN_SAMPLES]
    columns = [
        _Column("average accuracy", lambda run: _of(matrices.get(run.name), "average_accuracy"), ".1%", max),
        _Column("backward transfer", lambda run: _of(matrices.get(run.name), "backward_transfer"), "+.3f", max),
    ]
    if len(of_text) > _SETS_AT_MOST:
        several = f"forgetting of {len(of_text)} sets"
        columns += [
            _Column(f"{several}, mean", lambda run: _mean(_last(run, of_text)), "+.3f"),
            _Column(f"{several}, worst", lambda run: _worst(_last(run, of_text)), "+.3f"),
        ]
        keys = [key for key in keys if key not in of_text]
    columns += [_logged(key, f"forgetting of {key.partition('/')[2]}", "+.3f") for key in keys]
    parts = list(seconds)
    columns += [
        _logged(new_loss, new_loss),
        _Column("steps", lambda run: run.steps, ".0f", None),
        _Column("added seconds", lambda run: _sum(_last(run, parts)), ".1f"),
    ]
    return _table("", runs, columns)


def all_figures(
    runs: Sequence[RunLog], sets: Sequence[str], benchmarks: Sequence[str], seconds: Mapping[str, str]
) -> list[Table]:
    """A table of each prior set, benchmark, of replay and of the time, without columns that no run has a figure for."""
    tables = [
        _table(
            name,
            runs,
            [
                _logged(f"forgetting/{name}", "forgetting", "+.3f"),
                _logged(f"forgetting_error/{name}", "± standard error", best=None),
                _logged(f"prior_loss/{name}", "loss"),
                _logged(f"prior_perplexity/{name}", "perplexity", ",.2f"),
                _logged(f"prior_accuracy/{name}", "accuracy", ".1%", max),
                _logged(f"prior_kl/{name}", "KL"),
            ],
        )
        for name in sets
    ]
    tables += [_benchmark(name, runs) for name in benchmarks]
    replay = ("loss", "coefficient", "drift", "budget", "price")
    tables += [
        _table("replay", runs, [_logged(f"replay/{name}", name, best=None) for name in replay]),
        _table("seconds", runs, [_logged(key, title, ".1f") for key, title in seconds.items()]),
    ]
    return [table for table in tables if table.columns]


def matrix_table(run: str, matrix: Matrix) -> Table:
    """The accuracy on each set before and after each fit; in bold, that of a set when it had been learned."""
    rows = {
        title: [
            _Cell(value, "–" if value is None else f"{value:.1%}", value is not None and row == learned)
            for value, learned in zip(cells, matrix.learned, strict=True)
        ]
        for row, (title, cells) in enumerate(zip(matrix.rows, matrix.accuracy, strict=True))
    }
    note = f"Average accuracy {matrix.average_accuracy:.1%}"
    if matrix.backward_transfer is not None:
        note += f", backward transfer {matrix.backward_transfer:+.3f}"
    return Table(run, matrix.sets, rows, of_runs=False, note=f"{note}.")


def _benchmark(name: str, runs: Sequence[RunLog]) -> Table:
    """The last figure of a benchmark, and how much worse it is than at fit start."""
    error, drop = f"benchmark_stderr/{name}", f"benchmark_drop/{name}"
    columns = [
        _logged(f"benchmark/{name}", "figure", best=None),
        _logged(error, "± standard error", best=None),
        _Column("drop", lambda run: run.last(drop), "+.3f", None, error),
    ]
    return _table(name, runs, columns)


def _logged(key: str, title: str, shown: str = ".3f", best: Callable[[Iterable[float]], float] | None = min) -> _Column:
    return _Column(title, lambda run: run.last(key), shown, best)


def _table(title: str, runs: Sequence[RunLog], columns: Iterable[_Column]) -> Table:
    """The figures of runs. If all show the same figure, none is marked as the best."""
    rows: dict[str, list[_Cell]] = {run.name: [] for run in runs}
    shown_columns = []
    for column in columns:
        values = [column.value(run) for run in runs]
        if all(value is None for value in values):
            continue
        shown_columns.append(column.title)
        texts = ["–" if value is None else format(value, column.shown) for value in values]
        texts = [f"{text} (noise)" if _is_noise(run, column) else text for run, text in zip(runs, texts, strict=True)]
        shown = {text: value for text, value in zip(texts, values, strict=True) if value is not None}
        ranked = [value for value in shown.values() if not isnan(value)]
        best = column.best(ranked) if column.best is not None and len(shown) > 1 and ranked else None
        for row, value, text in zip(rows.values(), values, texts, strict=True):
            row.append(_Cell(value, text, best is not None and shown.get(text) == best))
    return Table(title, shown_columns, rows)


def _is_noise(run: RunLog, column: _Column) -> bool:
    """Whether a difference of two figures is less than two of its standard errors, as if they were independent."""
    errors, value = run.values.get(column.error or "", {}), column.value(run)
    if not errors or value is None:
        return False
    return abs(value) < 2 * hypot(errors[min(errors)], errors[max(errors)])


def _of(matrix: Matrix | None, figure: str) -> float | None:
    return None if matrix is None else getattr(matrix, figure)


def _last(run: RunLog, keys: Iterable[str]) -> list[float]:
    values = [run.last(key) for key in keys]
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _worst(values: Sequence[float]) -> float | None:
    """The largest; NaN, which compares with nothing, if one of them is."""
    return max(values, key=lambda value: (isnan(value), value), default=None)


def _sum(values: Sequence[float]) -> float | None:
    return sum(values) if values else None
