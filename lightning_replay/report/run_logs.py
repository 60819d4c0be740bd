"""Reading the logs of runs: of Lightning's CSVLogger, TensorBoard, Weights & Biases and MLflow."""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lightning_replay.report.trackers import (
    MLFLOW,
    MLFLOW_DATABASE,
    WANDB,
    Tracked,
    is_mlflow_database,
    is_mlflow_run,
    read_mlflow,
    read_mlflow_database,
    read_wandb,
    unfenced,
)

__all__ = ["BENCHMARK_SECONDS", "MONITOR_SECONDS", "OWN_SAMPLES", "NothingToReportError", "RunLog", "read_runs"]

_CSV, _EVENTS = "metrics.csv", "events.out.tfevents.*"
MONITOR_SECONDS = "forgetting/seconds"
"""The only key of the monitor that belongs to no prior set."""
OWN_SAMPLES = "self"
"""The monitor's set of the model's own samples, which each fit samples anew."""
_MONITOR_KEYS = (
    "forgetting/",
    "forgetting_error/",
    "prior_loss/",
    "prior_perplexity/",
    "prior_accuracy/",
    "prior_kl/",
)
"""Prefixes of the keys of ``ForgettingMonitor``; the name of a prior set follows."""
BENCHMARK_SECONDS = "benchmark/seconds"
"""The only key of ``BenchmarkMonitor`` that belongs to no benchmark."""
_CALLBACK_KEYS = (*_MONITOR_KEYS, "benchmark/", "replay/")
_SAMPLES, _VERDICT = "replay/samples/text_summary", "replay/verdict/text_summary"
_VERDICT_FILE = "replay_verdict.txt"
"""Beside a CSV file, which holds no text."""


class NothingToReportError(ValueError):
    """There are no logs to make a report of."""


@dataclass
class RunLog:
    """What one run logged.

    Attributes:
        name: Path of its folder, relative to the folder that holds all runs. If a tracker knows the run by a name,
            that name stands for the folder's.
        values: The value at each step, by key; steps in ascending order.
        samples: The previews of each refill, by step.
        verdicts: How each fit with a budget ended, by step.
        notes: Parts of the logs that were left out.
        fits: If the run is a sequence of fits, what each of them logged.
    """

    name: str
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    samples: dict[int, list[str]] = field(default_factory=dict)
    verdicts: dict[int, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fits: "list[RunLog]" = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The last step at which anything was logged."""
        return max((max(series) for series in self.values.values()), default=0)

    @property
    def prior_sets(self) -> list[str]:
        """Names of the monitored prior sets, in alphabetical order, because CSV files keep no order."""
        of_sets = [key for key in self.values if key.startswith(_MONITOR_KEYS) and key != MONITOR_SECONDS]
        return sorted({key.partition("/")[2] for key in of_sets})

    @property
    def benchmarks(self) -> list[str]:
        """Names of what ``BenchmarkMonitor`` measured, a task and its metric, in alphabetical order."""
        return sorted(
            key.removeprefix("benchmark/")
            for key in self.values
            if key.startswith("benchmark/") and key != BENCHMARK_SECONDS
        )

    def first(self, key: str) -> float | None:
        """The first value of a key, or None if it was never logged."""
        series = self.values.get(key)
        return None if series is None else series[min(series)]

    def last(self, key: str) -> float | None:
        """The last value of a key, or None if it was never logged."""
        series = self.values.get(key)
        return None if series is None else series[max(series)]

    def add(self, key: str, values: Iterable[tuple[int, float]]) -> None:
        """Add values of a key; the new value of a step replaces an earlier one."""
        series = self.values.get(key, {}) | dict(values)
        if series:
            self.values[key] = dict(sorted(series.items()))


def read_runs(folders: Sequence[Path]) -> tuple[list[RunLog], list[str]]:
    """Read all runs in folders and their subfolders.

    Each folder with a ``metrics.csv`` or TensorBoard's event files is a run. If it has both, they are merged; at the
    same step the CSV file takes precedence, because it has all digits. So is each run's folder of Weights & Biases,
    offline or not, and of MLflow's file store, and each run in MLflow's SQLite database.

    Args:
        folders: The folders to search.

    Returns:
        The runs made with the callbacks, in natural order of their folders, and the names of the other runs.

    Raises:
        NothingToReportError: If a folder is missing, or no run made with the callbacks is found.
        ModuleNotFoundError: If there are event files and ``tensorboard`` is not installed, or a run of Weights & Biases
            and ``wandb`` is not.
    """
    for folder in folders:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise NothingToReportError(
                f"{folder} {what}. Give folders that hold the logs of runs, such as `lightning_logs`."
            )
    roots = [folder.resolve() for folder in folders]
    patterns = (_CSV, _EVENTS, WANDB, MLFLOW)
    logs = {log for root in roots for pattern in patterns for log in root.rglob(pattern)}
    found = {log.parent for log in logs if log.name != MLFLOW or is_mlflow_run(log.parent)}
    databases = {path for root in roots for path in root.rglob(MLFLOW_DATABASE) if is_mlflow_database(path)}
    given = ", ".join(map(str, folders))
    if not found and not databases:
        raise NothingToReportError(
            f"No logs in {given} or below: a run's folder holds `{_CSV}`, `{_EVENTS}`, `{WANDB}` or, in MLflow's "
            f"stores, `{MLFLOW}` or `mlflow.db`. Train with a logger that writes one of them and give the folder that "
            "it writes to."
        )
    common = Path(os.path.commonpath(roots))
    read = [_read_run(folder, common) for folder in sorted(found, key=_natural)]
    for database in sorted(databases, key=_natural):
        for run, tracked in read_mlflow_database(database).items():
            log = RunLog((database.parent.relative_to(common) / run).as_posix())
            read.append((log, _add_tracked(log, tracked)))
    runs = _titled(read)
    known = [run for run in runs if any(key.startswith(_CALLBACK_KEYS) for key in run.values)]
    if not known:
        keys = sorted({key for run in runs for key in run.values})
        raise NothingToReportError(
            f"The logs in {given} have no values of ForgettingMonitor or SelfGeneratedReplay, such as "
            f"`forgetting/<name>`. Their keys: {', '.join(keys) or 'none'}. Train with one of these callbacks."
        )
    return known, [run.name for run in runs if run not in known]


def _natural(path: Path) -> list[str | int]:
    """Sort key that puts ``version_2`` before ``version_10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _read_run(folder: Path, common: Path) -> tuple[RunLog, str]:
    run = RunLog(folder.name if folder == common else folder.relative_to(common).as_posix())
    title = ""
    if any(folder.glob(WANDB)):
        title = _add_tracked(run, read_wandb(folder))
    if (folder / MLFLOW).exists() and is_mlflow_run(folder):
        title = _add_tracked(run, read_mlflow(folder))
    if any(folder.glob(_EVENTS)):
        _read_events(folder, run)
    if (folder / _CSV).exists():
        _read_csv(folder / _CSV, run)
    if (folder / _VERDICT_FILE).exists():
        run.verdicts[run.steps] = [(folder / _VERDICT_FILE).read_text("utf-8").strip()]
    return run, title


def _add_tracked(run: RunLog, tracked: Tracked) -> str:
    """Add what a tracker kept of a run and return the run's title."""
    for key, series in tracked.values.items():
        run.add(key, series.items())
    run.samples |= tracked.samples
    run.verdicts |= tracked.verdicts
    if not tracked.is_whole:
        run.notes.append(f"The log in {run.name} is cut off; what it holds up to there is shown.")
    return tracked.title


def _titled(read: Sequence[tuple[RunLog, str]]) -> list[RunLog]:
    """The runs, with the titles that trackers gave them in their names as far as names stay unique."""
    folders = {run.name for run, _ in read}
    titled = [(PurePosixPath(run.name).parent / title.replace("/", "-")).as_posix() for run, title in read]
    for (run, title), name in zip(read, titled, strict=True):
        if title and titled.count(name) == 1 and name not in folders:
            run.name = name
    return [run for run, _ in read]


def _read_csv(path: Path, run: RunLog) -> None:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        lines = file.readlines()
    if lines and not lines[-1].endswith("\n"):
        # A number that is cut off still parses, as another number.
        lines.pop()
        run.notes.append(f"The last line of {run.name}/{path.name} is cut off and was left out.")
    series: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(lines, restval="", restkey=""):
        step = _number(row.get("step", ""))
        if step is None:
            continue
        for key, cell in row.items():
            value = _number(cell)
            if value is not None:
                series.setdefault(key, {})[int(step)] = value
    for key in series.keys() - {"step", "epoch"}:
        run.add(key, series[key].items())


def _number(cell: str | list[str]) -> float | None:
    """The number in a cell, which may be NaN; None if there is none."""
    try:
        return float(cell)  # type: ignore[arg-type]  # the cells beyond the header's are a list
    except (TypeError, ValueError):
        return None


def _read_events(folder: Path, run: RunLog) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{folder} holds TensorBoard logs, and tensorboard, which reads them, is not installed: "
            "pip install 'lightning-replay[report]'"
        ) from error
    # 0 keeps all events; the default keeps a random part of them.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    for key in events.Tags()["scalars"]:
        run.add(key, ((event.step, event.value) for event in events.Scalars(key)))
    for key, texts in {_SAMPLES: run.samples, _VERDICT: run.verdicts}.items():
        for event in events.Tensors(key) if key in events.Tags()["tensors"] else ():
            texts[event.step] = unfenced(event.tensor_proto.string_val[0].decode(errors="replace"))
