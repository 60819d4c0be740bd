"""What the scripts of this folder report with: CSV files, pictures, tables, and the pages that these go into.

A script has two halves. The first does the runs and writes what they gave to CSV files; the second makes the summary,
the table and the picture of what it reads there, so that they can be made again without any run.
"""

import csv
import os
import platform
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from lightning_replay.__about__ import __version__
from lightning_replay.report.plots import STYLE
from lightning_replay.utilities.io import atomic_write
from lightning_replay.utilities.tables import markdown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from experiments import Lab

Line = TypeVar("Line", bound="DataclassInstance")

FOLDER = Path(__file__).parent
"""Where the scripts are, and the files of the runs that the pages are about."""
VERSIONS = "versions"
"""The last column of a CSV file, filled in its first line."""
TYPES: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: "True".__eq__,
    float | None: lambda text: float(text) if text else None,
}
"""How the cells of a CSV file are read."""


@dataclass
class Report:
    """What a script found.

    Attributes:
        claim: Of the paper.
        experiment: Ours, in one line.
        paper: The paper's figures.
        ours: Our figures.
        details: More of them, as a Markdown table.
        draw: Draws the picture.
        size: Of the picture, in inches.
    """

    claim: str
    experiment: str
    paper: str
    ours: str
    details: str
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (7.5, 4.2)

    def figure(self) -> Figure:
        """The picture."""
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=self.size, layout="constrained")
        self.draw(figure)
        return figure


@dataclass(frozen=True)
class Script:
    """Both halves of a script.

    Attributes:
        files: The dataclass of a line, by the name of each CSV file. The first file has the name of the script.
        measure: Does the runs; returns the lines of each file. A file that it leaves out stays as it is.
        report: Makes the report of the lines of all files, in their order.
    """

    files: Mapping[str, type]
    measure: Callable[["Lab"], Mapping[str, Sequence[Any]]]
    report: Callable[..., Report]

    @property
    def name(self) -> str:
        """Of the script."""
        return next(iter(self.files))

    def write(self, lab: "Lab") -> None:
        """Do the runs, and write the CSV files."""
        for name, lines in self.measure(lab).items():
            write_csv(lab.folder / f"{name}.csv", self.files[name], lines)

    def read(self, folder: Path) -> Report:
        """Make the report of the CSV files in a folder."""
        return self.report(*(read_csv(folder / f"{name}.csv", kind) for name, kind in self.files.items()))


def columns(kind: "type[DataclassInstance]") -> list["Field[Any]"]:
    """The columns of a CSV file whose lines are of a dataclass: those that tell the runs apart first."""
    return sorted(fields(kind), key=lambda each: not each.kw_only)


def write_csv(path: Path, kind: type[Line], lines: Sequence[Line]) -> None:
    """Write lines, and with the first what this computer runs now, and the day."""
    names = [each.name for each in columns(kind)]
    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "transformers"))
    day = datetime.now(timezone.utc).date()
    versions = f"lightning-replay {__version__} {packages} Python {platform.python_version()} {platform.machine()} CPU"
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, VERSIONS])
        for index, line in enumerate(lines):
            writer.writerow([*(getattr(line, name) for name in names), "" if index else f"{versions} {day}"])


def read_csv(path: Path, kind: type[Line]) -> list[Line]:
    """The lines of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            kind(**{each.name: TYPES[each.type](line[each.name]) for each in fields(kind)})
            for line in csv.DictReader(file)
        ]


def regions(reports: Mapping[str, Report], page: Path) -> dict[str, str]:
    """What goes into a page, by the names of its regions.

    Args:
        reports: By the name of the script. The region of a single one has its name; several share one table.
        page: The page, which links to the scripts.
    """
    if len(reports) == 1:
        return {name: report.details for name, report in reports.items()}
    here = os.path.relpath(FOLDER, page.resolve().parent)
    return {"paper results": summary(reports, f"{here}/"), "paper details": details(reports)}


def summary(reports: Mapping[str, Report], here: str = "") -> str:
    """A table with a line for each report, and links to the scripts."""
    cells = [
        [each.claim, each.experiment, each.paper, each.ours, f"[`{name}.py`]({here}{name}.py)"]
        for name, each in reports.items()
    ]
    return markdown(["claim", "experiment", "the paper", "here", "script"], cells)


def details(reports: Mapping[str, Report]) -> str:
    """The tables of all reports."""
    wrapper = textwrap.TextWrapper(120, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(
        f"{wrapper.fill(f'**{each.claim}** ({each.experiment})')}\n\n{each.details}" for each in reports.values()
    )


def fill(page: Path, region: str, text: str) -> None:
    """Put text between ``<!-- region -->`` and ``<!-- end of region -->`` in a Markdown file that has these marks."""
    begin, end = f"<!-- {region} -->", f"<!-- end of {region} -->"
    old = page.read_text(encoding="utf-8")
    new = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL)
    page.write_text(new, encoding="utf-8")


def plain_numbers(axis: Any) -> None:
    """Label the ticks of a logarithmic axis with numbers, which need no mathematical notation."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def cell(values: Iterable[float], form: str = "+.3f") -> str:
    """Mean and half the distance of the extremes; values that are not a number are counted and left out."""
    values = list(values)
    known = [value for value in values if value == value]
    if not known:
        return "not reached"
    spread = format((max(known) - min(known)) / 2, form.lstrip("+"))
    note = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    return f"{mean(known):{form}} ± {spread}{note}".replace("-", "−")


def count(values: Iterable[Any], noun: str) -> str:
    """How many different ones there are, in words such as "3 seeds"."""
    number = len(set(values))
    return f"{number} {noun}{'s' * (number != 1)}"


def scientific(rate: float) -> str:
    """A learning rate as it is usually written, such as 1e-3."""
    return f"{rate:.0e}".replace("e-0", "e-")
