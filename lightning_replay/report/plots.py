"""The report's pictures: each is drawn once and written as SVG, for the page, and as PNG."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

try:
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The report is made with {error.name}, which is not installed: pip install 'lightning-replay[report]'"
    ) from error

__all__ = ["STEPS", "STYLE", "Curve", "Look", "Pictures"]

Curve = tuple[list[float], list[float]]
"""Values of x and of y."""

STEPS = "optimizer steps"
"""Label of the axis of steps, whose ticks are whole numbers."""

_COLORS = ("#3b7dd8", "#d9701a", "#2a9d62", "#a35bc7", "#d64550", "#1296a6", "#b08400", "#c2559d")
"""Each has a contrast ratio of at least 3 with the page, light and dark."""
_DASHES = ((), (5.0, 2.0), (1.5, 1.5), (6.0, 2.0, 1.5, 2.0))
_INK = "#2b2f36"
"""The color of text and axes in a PNG; in the page they have the color of its text."""
STYLE = {
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
_LARGE, _SMALL = (4.5, 3.0), (3.5, 2.3)
"""Sizes in inches: about as wide as a phone, so that text stays legible on it."""


@dataclass(frozen=True)
class Look:
    """How a run is drawn in every picture."""

    color: str
    dashes: tuple[float, ...]

    @classmethod
    def of(cls, index: int) -> "Look":
        """The look of the run with this number; the first 32 differ."""
        return cls(_COLORS[index % len(_COLORS)], _DASHES[index // len(_COLORS) % len(_DASHES)])

    def line(self) -> dict[str, Any]:
        """The look as arguments of matplotlib."""
        return {"color": self.color, "linestyle": (0, self.dashes) if self.dashes else "-", "linewidth": 1.8}


class Pictures:
    """Draws pictures and writes them to a folder as PNG.

    Args:
        output: The folder.
        looks: How each run is drawn, by name.
    """

    def __init__(self, output: Path, looks: Mapping[str, Look]) -> None:
        self.output = output
        self.looks = looks
        self.written: list[Path] = []

    def lines(
        self,
        name: str,
        curves: Mapping[str, Curve],
        title: str,
        x_label: str = STEPS,
        y_label: str = "",
        *,
        small: bool = False,
        zero: bool = False,
        ends: bool = False,
        limits: Mapping[str, Curve] = MappingProxyType({}),
        bands: Mapping[str, Sequence[float]] = MappingProxyType({}),
        marks: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> Markup:
        """Draw a curve for each run.

        Args:
            name: Name of the file.
            curves: The curve of each run, by name; values that are not finite are left out.
            title: Title of the picture.
            x_label: Label of the x axis.
            y_label: Label of the y axis.
            small: Whether to draw a small picture, one of many.
            zero: Whether to draw a line at y = 0.
            ends: Whether to mark the end of each run.
            limits: A thin line for each run that has one, by name.
            bands: How wide a band around the curve is to each side, for each run that has one, by name.
            marks: Values of x to mark with vertical lines, by name of the run.

        Returns:
            SVG for a page that has a legend of its own.
        """
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=_SMALL if small else _LARGE, layout="constrained")
            axis = figure.add_subplot()
            if zero:
                axis.axhline(0, color=_INK, linewidth=0.8, alpha=0.5, zorder=0)
            for run, (x, y) in curves.items():
                finite = [a if isfinite(a) and isfinite(b) else nan for a, b in zip(x, y, strict=True)]
                dots = "o" if len(x) <= 40 else None
                axis.plot(finite, y, marker=dots, markersize=3.5, **self.looks[run].line())
                if run in bands:
                    low, high = np.array(y) - bands[run], np.array(y) + bands[run]
                    axis.fill_between(finite, low, high, color=self.looks[run].color, alpha=0.15, linewidth=0)
                if run in limits:
                    axis.plot(*limits[run], **self.looks[run].line() | {"linewidth": 0.9, "alpha": 0.7})
                for place in marks.get(run, ()):
                    axis.axvline(place, **self.looks[run].line() | {"linewidth": 0.9, "alpha": 0.45})
                if ends:
                    axis.plot(finite[-1:], y[-1:], marker="o", markersize=7, color=self.looks[run].color)
            axis.set(title=_short(title), xlabel=x_label, ylabel=y_label)
            if x_label == STEPS:
                axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
            svg = _svg(figure)
            width, height = figure.get_size_inches()
            figure.set_size_inches(width, height + 0.1 + 0.18 * len(curves))
            handles = [Line2D([], [], **self.looks[run].line()) for run in curves]
            figure.legend(handles, [_short(run) for run in curves], loc="outside lower left", frameon=False)
            return self._save(figure, name, svg)

    def bars(self, name: str, runs: Sequence[str], parts: Mapping[str, Sequence[float]], title: str) -> Markup:
        """Draw a bar of seconds for each run.

        Args:
            name: Name of the file.
            runs: Names of the runs.
            parts: The parts of each bar: by name, the seconds of each run.
            title: Title of the picture.

        Returns:
            SVG for a page.
        """
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(_LARGE[0], 1.1 + 0.5 * len(runs)), layout="constrained")
            axis = figure.add_subplot()
            places, ends = np.arange(len(runs))[::-1], np.zeros(len(runs))
            for (part, seconds), alpha in zip(parts.items(), np.linspace(0.9, 0.25, len(parts)), strict=True):
                axis.barh(places, seconds, 0.4, left=ends, color=_INK, alpha=alpha, label=part)
                ends += seconds
            for run, place, end in zip(runs, places, ends, strict=True):
                axis.text(0, place + 0.26, _short(run), va="bottom")
                axis.annotate(f"{end:,.1f} s", (end, place), (5, 0), textcoords="offset points", va="center")
            axis.margins(x=0.2)
            axis.set(title=title, yticks=[], ylim=(-0.4, len(runs) - 0.3))
            axis.set_xlim(left=0)
            axis.spines["left"].set_visible(False)
            figure.legend(loc="outside lower left", ncols=len(parts), frameon=False)
            return self._save(figure, name, _svg(figure))

    def _save(self, figure: Any, name: str, svg: str) -> Markup:
        """Write the PNG under a name that no earlier picture has, and return the SVG for a page."""
        slug = unique = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
        number = 1
        while (path := self.output / f"{unique}.png") in self.written:
            number += 1
            unique = f"{slug}-{number}"
        figure.savefig(path, dpi=160)
        self.written.append(path)
        return _inline(svg, unique)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    return buffer.getvalue()


def _inline(svg: str, name: str) -> Markup:
    """SVG for a page: with unique ids, in the color of the page's text, as wide as its container."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', '<svg role="img"', svg)
    return Markup(svg.replace(_INK, "currentColor"))


def _short(name: str, length: int = 48) -> str:
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"
