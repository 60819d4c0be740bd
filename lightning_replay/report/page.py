"""The report: one page and its pictures, drawn from the logs of runs with the callbacks."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

import numpy as np

from lightning_replay.__about__ import __version__
from lightning_replay.report.plots import Curve, Look, Pictures
from lightning_replay.report.run_logs import (
    BENCHMARK_SECONDS,
    MONITOR_SECONDS,
    NothingToReportError,
    RunLog,
    read_runs,
)
from lightning_replay.report.sequences import joined, matrix_of
from lightning_replay.report.tables import all_figures, final_figures, matrix_table

try:
    import jinja2
    from markupsafe import Markup, escape
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The report is made with {error.name}, which is not installed: pip install 'lightning-replay[report]'"
    ) from error

__all__ = ["against_new_task", "report"]

NEW_LOSSES = ("val/loss", "val_loss", "train/loss", "train_loss")
"""Keys of the new task's loss, in order of preference."""
SECONDS = {
    "replay/sampling_seconds": "sampling",
    "replay/loss_seconds": "replay loss",
    MONITOR_SECONDS: "monitoring",
    BENCHMARK_SECONDS: "benchmarks",
}
QUALITY = {
    "distinct_1": "Distinct tokens",
    "distinct_2": "Distinct pairs of tokens",
    "repetition": "Repeated 4-grams",
    "log_prob": "Log-probability, nats a token",
    "ended": "Samples with the end token",
    "length": "Tokens in a sample",
}
"""Titles of the pictures of ``replay/quality/``, by measure."""


_MADE_BY = "Made by lightning-replay"
"""How the last line of a page begins."""


@dataclass
class _Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: What the pictures show and how to read them.
        pictures: The pictures, as SVG for the page.
        runs: Names of the runs in the pictures.
        missing: What could not be drawn, and why.
        small: Whether the pictures are small.
    """

    title: str
    text: str
    pictures: list[Markup] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    small: bool = False

    def add(self, picture: Markup, runs: Iterable[str]) -> None:
        """Add a picture of some runs."""
        self.pictures.append(picture)
        self.runs += [run for run in runs if run not in self.runs]


def report(folders: Sequence[Path], output: Path, new_loss: str | None = None) -> list[Path]:
    """Write ``report.html``, a page that needs no other file, and its pictures as PNG.

    A fit that continues the one that ended where it begins is drawn after it, as one run; see ``sequences``.

    Args:
        folders: Folders with the logs of runs; see ``read_runs``.
        output: Folder to write to; made if it is missing.
        new_loss: Key of the new task's loss; by default the one of ``NEW_LOSSES`` that most runs have.

    Returns:
        The files written, the page first.

    Raises:
        NothingToReportError: If a folder is missing, no run made with the callbacks is found, or ``new_loss`` is
            in no log.
        FileExistsError: If there is a ``report.html`` that this function has not written.
        ModuleNotFoundError: If there are TensorBoard logs and ``tensorboard`` is not installed, or runs of Weights &
            Biases and ``wandb`` is not.
    """
    fits, left_out = read_runs(folders)
    runs = joined(fits)
    new_loss = _new_loss(runs, new_loss)
    sets = sorted({name for run in runs for name in run.prior_sets})
    path = output / "report.html"
    if path.exists() and _MADE_BY not in path.read_text("utf-8", errors="replace"):
        raise FileExistsError(f"{path} is no page of this command, which would replace it. Give another `--output`.")
    output.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(output, {run.name: Look.of(index) for index, run in enumerate(runs)})
    benchmarks = sorted({name for run in runs for name in run.benchmarks})
    sections = [_forgetting(runs, sets, new_loss, pictures)]
    sections += [_benchmarks(runs, benchmarks, pictures)] if benchmarks else []
    sections += [_time(runs, pictures), _quality(runs, pictures)]
    notes = list(dict.fromkeys(note for run in runs for note in run.notes))
    if left_out:
        notes.append(f"Left out, because they have no values of the callbacks: {', '.join(left_out)}.")
    matrices = {run.name: matrix for run in runs if (matrix := matrix_of(run)) is not None}
    page = _template().render(
        made_by=f"{_MADE_BY} {__version__}.",
        verdicts={fit.name: _last(fit.verdicts) for run in runs for fit in (run.fits or [run]) if fit.verdicts},
        runs=runs,
        looks=pictures.looks,
        final=final_figures(runs, sets, new_loss, SECONDS, matrices),
        matrices=[matrix_table(run, matrix) for run, matrix in matrices.items()],
        tables=all_figures(runs, sets, benchmarks, SECONDS),
        sections=sections,
        samples={run.name: _first_and_last(run.samples) for run in runs if run.samples},
        notes=notes,
    )
    path.write_text(page, encoding="utf-8")
    return [path, *pictures.written]


def _new_loss(runs: Sequence[RunLog], wanted: str | None) -> str:
    if wanted is None:
        return max(NEW_LOSSES, key=lambda key: sum(key in run.values for run in runs))
    if not any(wanted in run.values for run in runs):
        losses = sorted({key for run in runs for key in run.values if "loss" in key and "prior_" not in key})
        raise NothingToReportError(
            f"No run has logged the new task's loss as {wanted!r}. Keys like it: {', '.join(losses) or 'none'}."
        )
    return wanted


def _forgetting(runs: Sequence[RunLog], sets: Sequence[str], new_loss: str, pictures: Pictures) -> _Section:
    section = _Section(
        "Forgetting",
        "Forgetting is the rise of the loss on a held-out prior set since fit start, in nats a token; on `self`, the "
        "model's own samples, it is the KL divergence from the model at fit start. Against the new task's loss it "
        "shows the price of learning: of two runs at the same new-task loss, the lower one has forgotten less. The "
        "large dot marks the end of a run.",
    )
    sequences = {run.name: _ends(run) for run in runs if run.fits}
    if sequences:
        section.text += (
            " Of a sequence of fits, it is the rise since the end of the fit that learned the set; on `self`, each fit "
            "begins anew. Vertical lines mark the ends of fits."
        )
    averaged = new_loss.startswith("train")
    if averaged:
        section.text += f" `{new_loss}` is the loss of single batches; each dot is its mean between two measurements."
    for name in sets:
        forgetting, prior_loss = f"forgetting/{name}", f"prior_loss/{name}"
        if curves := _curves(runs, forgetting):
            title = f"Forgetting of {name}"
            drawn = pictures.lines(
                f"forgetting-{name}", curves, title, y_label="nats a token", zero=True, marks=sequences
            )
            section.add(drawn, curves)
        if curves := _curves([run for run in runs if run.fits], f"prior_accuracy/{name}"):
            drawn = pictures.lines(f"accuracy-{name}", curves, f"Accuracy on {name}", marks=sequences)
            section.add(drawn, curves)
        both = [run for run in runs if not run.fits and prior_loss in run.values and new_loss in run.values]
        pairs = {run.name: against_new_task(run, prior_loss, new_loss, averaged) for run in both}
        if curves := {run: pair for run, pair in pairs.items() if pair[0]}:
            drawn = pictures.lines(
                f"new-task-{name}",
                curves,
                f"Loss on {name} against the new task's",
                f"new-task loss ({new_loss})",
                "prior loss",
                ends=True,
            )
            section.add(drawn, curves)
        section.missing += _missing(runs, forgetting)
    if curves := _curves(runs, "replay/drift"):
        section.text += " Drift is the KL divergence on replay rows; the thin line is its budget."
        limits = _curves(runs, "replay/budget")
        drawn = pictures.lines(
            "drift", curves, "Drift and its budget", y_label="nats a token", zero=True, limits=limits
        )
        section.add(drawn, curves)
    if curves := _curves(runs, "replay/price"):
        section.text += " The price of a budget is how many nats of the new task's loss a nat of drift buys."
        drawn = pictures.lines("price", curves, "Price of the budget", y_label="nats a nat", zero=True)
        section.add(drawn, curves)
    if not sets:
        section.missing += [
            "No run has logged `forgetting/<name>`. Add a ForgettingMonitor to the Trainer's callbacks."
        ]
    section.missing += _missing(runs, new_loss)
    return section


def _benchmarks(runs: Sequence[RunLog], benchmarks: Sequence[str], pictures: Pictures) -> _Section:
    section = _Section(
        "Benchmarks",
        "What each benchmark measures on the way; the band is two standard errors to each side. A drop is the change "
        "for the worse since fit start. It is marked as noise in the table if it is less than two standard errors of a "
        "difference between independent samples of documents. Both figures are of the same documents, so a smaller "
        "drop can be real.",
        small=True,
    )
    for name in benchmarks:
        curves = _curves(runs, f"benchmark/{name}")
        errors = {run.name: run.values.get(f"benchmark_stderr/{name}", {}) for run in runs if run.name in curves}
        widths = {run: [2 * errors[run].get(int(step), nan) for step in steps] for run, (steps, _) in curves.items()}
        section.add(pictures.lines(f"benchmark-{name}", curves, name, small=True, bands=widths), curves)
        section.missing += _missing(runs, f"benchmark/{name}")
    return section


def _time(runs: Sequence[RunLog], pictures: Pictures) -> _Section:
    section = _Section("Time", "The time that replay and monitoring took, in seconds over the whole run.")
    logged = {key: part for key, part in SECONDS.items() if any(key in run.values for run in runs)}
    timed = [run for run in runs if any(key in run.values for key in logged)]
    if timed:
        parts = {part: [run.last(key) or 0.0 for run in timed] for key, part in logged.items()}
        section.pictures.append(pictures.bars("time", [run.name for run in timed], parts, "Seconds of the whole run"))
    wanted = [key for key in SECONDS if key in logged or key != BENCHMARK_SECONDS]  # benchmarks are not for every run
    section.missing += [line for key in wanted for line in _missing(runs, key)]
    return section


def _quality(runs: Sequence[RunLog], pictures: Pictures) -> _Section:
    section = _Section(
        "Quality of the samples",
        "Measured at each refill. Samples that repeat themselves, or become likelier and less distinct from refill to "
        "refill, protect less.",
        small=True,
    )
    for measure, title in QUALITY.items():
        if curves := _curves(runs, f"replay/quality/{measure}"):
            section.add(pictures.lines(f"quality-{measure}", curves, title, small=True), curves)
    without = [run.name for run in runs if run.name not in section.runs]
    section.missing += _not_in("replay/quality/<measure>", without, runs)
    return section


def _ends(run: RunLog) -> list[float]:
    """The steps at which the fits of a sequence but the last ended."""
    return [float(step) for step in np.cumsum([fit.steps for fit in run.fits])[:-1]]


def _curves(runs: Sequence[RunLog], key: str) -> dict[str, Curve]:
    return {run.name: _series(run, key) for run in runs if key in run.values}


def _series(run: RunLog, key: str) -> Curve:
    return list(run.values[key]), list(run.values[key].values())


def against_new_task(run: RunLog, prior: str, new: str, averaged: bool) -> Curve:
    """New-task loss and prior loss after the same numbers of optimizer steps.

    The monitor logs at the number of steps taken, Lightning at the index of the last step. Between two measurements,
    the prior loss is interpolated linearly. New-task losses after the last measurement, which a run that was stopped
    has, are left out.
    """
    measured_at, prior_losses = (np.array(values, dtype=float) for values in _series(run, prior))
    steps, new_losses = (np.array(values, dtype=float) for values in _series(run, new))
    behind = steps + 1
    known = (behind >= measured_at[0]) & (behind <= measured_at[-1])
    behind, new_losses = behind[known], new_losses[known]
    matched = np.interp(behind, measured_at, prior_losses)
    if averaged:
        interval = np.searchsorted(measured_at, behind)
        groups = [interval == number for number in np.unique(interval)]
        new_losses, matched = (np.array([values[group].mean() for group in groups]) for values in (new_losses, matched))
    return new_losses.tolist(), matched.tolist()


def _missing(runs: Sequence[RunLog], key: str) -> list[str]:
    return _not_in(key, [run.name for run in runs if key not in run.values], runs)


def _not_in(key: str, names: Sequence[str], runs: Sequence[RunLog]) -> list[str]:
    """A line with the runs that lack a key; no line if none does."""
    if len(names) == len(runs):
        return [f"No run has logged `{key}`."]
    return [f"`{key}` was not logged by {', '.join(names)}."] if names else []


def _first_and_last(samples: Mapping[int, list[str]]) -> dict[int, list[str]]:
    return {step: samples[step] for step in (min(samples), max(samples))}


def _last(texts: Mapping[int, list[str]]) -> str:
    return " ".join(texts[max(texts)])


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_replay.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return environment.get_template("report.html")


def _code(text: str) -> Markup:
    """Escaped text, with the parts between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
