"""The report: one page and its pictures, of what runs with the callbacks have logged."""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import numpy as np

import lightning_replay
from lightning_replay.run_logs import NothingToReportError, RunLog, read_runs

try:
    import jinja2
    import matplotlib
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The report is made with {error.name}, which is not installed: pip install 'lightning-replay[report]'"
    ) from error

__all__ = ["against_new_task", "report"]

NEW_LOSSES = ("val/loss", "val_loss", "train/loss", "train_loss")
"""Keys of the new task's loss, the best first."""
SECONDS = {
    "replay/sampling_seconds": "sampling",
    "replay/loss_seconds": "replay loss",
    "forgetting/seconds": "monitoring",
}
QUALITY = {
    "distinct_1": "distinct tokens",
    "distinct_2": "distinct pairs of tokens",
    "repetition": "repeated 4-grams",
    "log_prob": "log-probability, nats a token",
    "ended": "samples with the end token",
    "length": "tokens in a sample",
}

_COLORS = ("#3b7dd8", "#d9701a", "#2a9d62", "#a35bc7", "#d64550", "#1296a6", "#b08400", "#c2559d")
"""Of runs: each has a contrast of at least 3 with the page, light and dark."""
_DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
_INK = "#2b2f36"
"""Of text and axes: as it is in a PNG, and the colour of the page's text in the page."""
_STYLE = {
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,  # names are text
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
}
_STEPS = "optimizer steps"
_LARGE, _SMALL = (4.5, 3.0), (3.5, 2.3)


@dataclass(frozen=True)
class _Look:
    """How a run is drawn, in every picture."""

    color: str
    dashes: tuple[float, ...]

    def line(self, **options: Any) -> dict[str, Any]:
        style = (0, self.dashes) if self.dashes else "-"
        return {"color": self.color, "linestyle": style, "linewidth": 1.8, **options}


@dataclass
class _Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: What the pictures show and how to read them.
        pictures: As SVG to stand in the page.
        runs: Names of the runs in the pictures.
        missing: What could not be drawn, and why.
        small: Whether the pictures are small ones.
    """

    title: str
    text: str
    pictures: list[Markup] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    small: bool = False


@dataclass(frozen=True)
class _Column:
    """A figure of each run; ``best`` is which of them to print in bold."""

    key: str
    group: str
    title: str
    shown: str = ".3f"
    best: Callable[[Iterable[float]], float] | None = min


@dataclass(frozen=True)
class _Cell:
    value: float | None
    text: str
    best: bool


def report(folders: Sequence[Path], output: Path, new_loss: str | None = None) -> list[Path]:
    """Write ``report.html``, a page that needs no other file, and its pictures as PNG.

    Args:
        folders: Where the logs of runs are; see :func:`~lightning_replay.run_logs.read_runs`.
        output: Folder to write to; made where it is missing.
        new_loss: Key of the new task's loss; by default the one of :data:`NEW_LOSSES` that most runs have.

    Returns:
        What was written, the page first.

    Raises:
        NothingToReportError: If a folder is missing, no run made with the callbacks is found, or ``new_loss`` is
            in no log.
        ModuleNotFoundError: If there are TensorBoard logs and ``tensorboard`` is not installed.
    """
    runs, left_out = read_runs(folders)
    new_loss = _new_loss(runs, new_loss)
    sets = list(dict.fromkeys(name for run in runs for name in run.prior_sets))
    output.mkdir(parents=True, exist_ok=True)
    pictures = _Pictures(output, {run.name: _look(index) for index, run in enumerate(runs)})
    with matplotlib.rc_context(_STYLE):
        sections = [
            _forgetting(runs, sets, new_loss, pictures),
            _time(runs, pictures),
            _quality(runs, pictures),
        ]
    notes = [note for run in runs for note in run.notes]
    if left_out:
        notes.append(f"Left out, as they logged nothing of the callbacks: {', '.join(left_out)}.")
    columns = _columns(runs, sets, new_loss)
    page = _template().render(
        version=lightning_replay.__version__,
        runs=runs,
        looks=pictures.looks,
        groups=[(group, list(members)) for group, members in groupby(columns, lambda column: column.group)],
        rows=_rows(runs, columns),
        sections=sections,
        samples={run.name: _first_and_last(run.samples) for run in runs if run.samples},
        notes=notes,
    )
    path = output / "report.html"
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


def _columns(runs: Sequence[RunLog], sets: Sequence[str], new_loss: str) -> list[_Column]:
    """The columns of the table for which any run has a figure."""
    columns = [_Column(new_loss, "new task", new_loss)]
    for name in sets:
        columns += [
            _Column(f"forgetting/{name}", name, "forgetting", "+.3f"),
            _Column(f"prior_loss/{name}", name, "loss"),
            _Column(f"prior_perplexity/{name}", name, "perplexity", ".4g"),
            _Column(f"prior_accuracy/{name}", name, "accuracy", ".1%", max),
            _Column(f"prior_kl/{name}", name, "KL"),
        ]
    columns.append(_Column("replay/loss", "replay", "loss", best=None))
    columns += [_Column(key, "seconds", title, ".1f") for key, title in SECONDS.items()]
    return [column for column in columns if any(column.key in run.values for run in runs)]


def _rows(runs: Sequence[RunLog], columns: Sequence[_Column]) -> list[list[_Cell]]:
    """The last figures of each run; of two runs that show the same, neither is better."""
    rows: list[list[_Cell]] = [[] for _ in runs]
    for column in columns:
        values = [run.last(column.key) for run in runs]
        texts = ["–" if value is None else format(value, column.shown) for value in values]
        shown = {text: value for text, value in zip(texts, values, strict=True) if value is not None}
        ranked = [value for value in shown.values() if not isnan(value)]
        best = column.best(ranked) if column.best is not None and len(shown) > 1 and ranked else None
        for row, value, text in zip(rows, values, texts, strict=True):
            row.append(_Cell(value, text, best is not None and shown.get(text) == best))
    return rows


def _forgetting(runs: Sequence[RunLog], sets: Sequence[str], new_loss: str, pictures: "_Pictures") -> _Section:
    section = _Section(
        "Forgetting",
        "Forgetting is the rise of the loss on a held-out prior set since fit start, in nats a token. Against the "
        "new task's loss it shows the price of learning: of two runs, the lower one at the same new-task loss has "
        "kept more. The large dot is a run's end.",
    )
    averaged = new_loss.startswith("train")
    if averaged:
        section.text += f" `{new_loss}` is of single batches; a dot is its mean between two measurements."
    for name in sets:
        curves = {run.name: _series(run, f"forgetting/{name}") for run in runs if f"forgetting/{name}" in run.values}
        with pictures.lines(section, f"forgetting-{name}", curves) as axis:
            axis.axhline(0, color=_INK, linewidth=0.8, alpha=0.5, zorder=0)
            axis.set(title=f"Forgetting of {name}", xlabel=_STEPS, ylabel="nats a token")
        curves = {
            run.name: against_new_task(run, f"prior_loss/{name}", new_loss, averaged)
            for run in runs
            if f"prior_loss/{name}" in run.values and new_loss in run.values
        }
        if curves:
            with pictures.lines(section, f"new-task-{name}", curves, end=True) as axis:
                axis.set(title=f"Loss on {name} against the new task's", xlabel=f"new-task loss ({new_loss})", ylabel="prior loss")
        section.missing += _missing(runs, f"forgetting/{name}")
    if not sets:
        section.missing += ["No run has `forgetting/<name>`: none was made with a ForgettingMonitor."]
    section.missing += _missing(runs, new_loss)
    return section


def _time(runs: Sequence[RunLog], pictures: "_Pictures") -> _Section:
    section = _Section("Time", "What replay and monitoring have cost, in seconds of the whole run.")
    section.missing += [line for key in SECONDS for line in _missing(runs, key)]
    timed = [run for run in runs if any(key in run.values for key in SECONDS)]
    if not timed:
        return section
    places = np.arange(len(timed))[::-1]
    figure = Figure(figsize=(_LARGE[0], 1.1 + 0.5 * len(timed)), layout="constrained")
    axis = figure.add_subplot()
    ends = np.zeros(len(timed))
    for (key, label), alpha in zip(SECONDS.items(), (0.9, 0.55, 0.25), strict=True):
        seconds = np.nan_to_num([run.last(key) or 0.0 for run in timed])
        if any(key in run.values for run in timed):
            axis.barh(places, seconds, 0.4, left=ends, color=_INK, alpha=alpha, label=label)
        ends += seconds
    for run, place, end in zip(timed, places, ends, strict=True):
        axis.text(0, place + 0.26, _short(run.name), va="bottom")
        axis.annotate(f"{end:.1f} s", (end, place), (5, 0), textcoords="offset points", va="center")
    axis.set(title="Seconds of the whole run", yticks=[], ylim=(-0.4, len(timed) - 0.3))
    axis.margins(x=0.15)
    axis.set_xlim(left=0)
    axis.grid(visible=False, axis="y")
    axis.spines["left"].set_visible(False)
    figure.legend(loc="outside lower left", ncols=len(SECONDS), frameon=False)
    section.pictures.append(pictures.save(figure, "time"))
    return section


def _quality(runs: Sequence[RunLog], pictures: "_Pictures") -> _Section:
    section = _Section(
        "Quality of the samples",
        "Of each refill of the replay buffer. Samples that repeat themselves, or get likelier and less distinct from "
        "refill to refill, are worth less as replay.",
        small=True,
    )
    prefix = "replay/quality/"
    logged = list(dict.fromkeys(key for run in runs for key in run.values if key.startswith(prefix)))
    order = [f"{prefix}{measure}" for measure in QUALITY]
    for key in [*(key for key in order if key in logged), *(key for key in logged if key not in order)]:
        measure = key.removeprefix(prefix)
        curves = {run.name: _series(run, key) for run in runs if key in run.values}
        with pictures.lines(section, f"quality-{measure}", curves, size=_SMALL) as axis:
            axis.set(title=QUALITY.get(measure, measure).capitalize(), xlabel=_STEPS)
    without = [run.name for run in runs if not any(key in run.values for key in logged)]
    section.missing += _not_in(f"{prefix}<measure>", without, runs)
    return section


def _series(run: RunLog, key: str) -> tuple[list[float], list[float]]:
    return list(run.values[key]), list(run.values[key].values())


def against_new_task(run: RunLog, prior: str, new: str, averaged: bool) -> tuple[list[float], list[float]]:
    """New-task loss and prior loss behind the same optimizer steps.

    The monitor logs at the number of steps behind the weights, Lightning at the index of the last one. What is
    measured in between is the prior loss on the straight line from one measurement to the next.
    """
    measured_at, prior_losses = (np.array(values, dtype=float) for values in _series(run, prior))
    steps, new_losses = (np.array(values, dtype=float) for values in _series(run, new))
    matched = np.interp(steps + 1, measured_at, prior_losses)
    if averaged:
        interval = np.searchsorted(measured_at, steps + 1)
        groups = [interval == number for number in np.unique(interval)]
        new_losses, matched = (np.array([values[group].mean() for group in groups]) for values in (new_losses, matched))
    return new_losses.tolist(), matched.tolist()


def _missing(runs: Sequence[RunLog], key: str) -> list[str]:
    return _not_in(key, [run.name for run in runs if key not in run.values], runs)


def _not_in(key: str, names: Sequence[str], runs: Sequence[RunLog]) -> list[str]:
    """The line that says which runs lack a key, if any."""
    if len(names) == len(runs):
        return [f"No run has logged `{key}`."]
    return [f"`{key}` was not logged by {', '.join(names)}."] if names else []


def _first_and_last(samples: Mapping[int, list[str]]) -> dict[int, list[str]]:
    return {step: samples[step] for step in (min(samples), max(samples))}


def _look(index: int) -> _Look:
    return _Look(_COLORS[index % len(_COLORS)], _DASHES[index // len(_COLORS) % len(_DASHES)])


def _short(name: str, length: int = 44) -> str:
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"


class _Pictures:
    """Draws each picture once: as SVG for the page, whose legends are its own, and as PNG.

    Args:
        output: Folder for the PNG files.
        looks: How each run is drawn, by name.
    """

    def __init__(self, output: Path, looks: Mapping[str, _Look]) -> None:
        self.output = output
        self.looks = looks
        self.written: list[Path] = []

    @contextmanager
    def lines(
        self,
        section: _Section,
        name: str,
        curves: Mapping[str, tuple[list[float], list[float]]],
        size: tuple[float, float] = _LARGE,
        end: bool = False,
    ) -> Iterator[Any]:
        """Add a picture of a curve for each run to a section.

        Args:
            section: The section.
            name: The picture's name.
            curves: By run, x and y.
            size: Of the picture, in inches.
            end: Whether to mark the last point of each curve.

        Yields:
            The axes, to be labelled.
        """
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.add_subplot()
        for run, (x, y) in curves.items():
            points = [(a, b) if isfinite(a) and isfinite(b) else (np.nan, np.nan) for a, b in zip(x, y, strict=True)]
            dots = "o" if len(points) <= 40 else None
            axis.plot(*zip(*points, strict=True), **self.looks[run].line(marker=dots, markersize=3.5))
            if end:
                axis.plot(*points[-1], marker="o", markersize=8, color=self.looks[run].color)
        yield axis
        if axis.get_xlabel() == _STEPS:
            axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
        axis.title.set_text(_short(axis.get_title()))
        section.pictures.append(self.save(figure, name, list(curves)))
        section.runs += [run for run in curves if run not in section.runs]

    def save(self, figure: Any, name: str, runs: Sequence[str] = ()) -> Markup:
        """Write the PNG, with a legend of the runs, and return the SVG, without."""
        slug = self._slug(name)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        if runs:
            width, height = figure.get_size_inches()
            figure.set_size_inches(width, height + 0.1 + 0.18 * len(runs))
            handles = [Line2D([], [], **self.looks[run].line()) for run in runs]
            figure.legend(handles, [_short(run) for run in runs], loc="outside lower left", frameon=False)
        path = self.output / f"{slug}.png"
        figure.savefig(path, dpi=160)
        self.written.append(path)
        return _inline(buffer.getvalue(), slug)

    def _slug(self, name: str) -> str:
        """A file name that no earlier picture has."""
        slug = unique = re.sub(r"[^a-z0-9_.]+", "-", name.lower()).strip("-.")
        number = 1
        while self.output / f"{unique}.png" in self.written:
            number += 1
            unique = f"{slug}-{number}"
        return unique


def _inline(svg: str, name: str) -> Markup:
    """SVG as a part of a page: ids of its own, the page's colour of text, as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', '<svg role="img"', svg)
    return Markup(svg.replace(_INK, "currentColor"))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_replay", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return environment.get_template("report.html")


def _code(text: str) -> Markup:
    """Escaped text, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
