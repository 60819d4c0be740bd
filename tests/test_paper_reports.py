"""What the paper's scripts report of CSV files: the committed ones give the tables of the pages and the pictures."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alternatives
import budget
import experiments
import frontier
import objectives
import pytest
import run_all
import self_forgetting
import task_sequence
import verdict
from arms import PLAIN, ArmPoint
from experiments import parsed
from reports import FOLDER, Report, Script, cell, columns, details, fill, read_csv, regions, summary, write_csv

PAGE = FOLDER.parent / "results.md"
ALONE = [each.SCRIPT for each in (alternatives, budget, frontier, objectives, self_forgetting, verdict)]


def committed(scripts: Sequence[Script]) -> Any:
    """The scripts whose CSV files stand beside them."""
    kept = [script for script in scripts if (FOLDER / f"{script.name}.csv").exists()]
    return pytest.mark.parametrize("script", kept, ids=lambda script: script.name)


def region(name: str) -> str:
    """What stands in a region of the page."""
    _, begin, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    assert begin, name
    return rest.partition(f"\n<!-- end of {name} -->")[0]


def lines_of(script: Script) -> list[list[Any]]:
    """The lines of all CSV files of a script."""
    return [read_csv(FOLDER / f"{name}.csv", kind) for name, kind in script.files.items()]


def test_cells_hold_mean_and_half_the_distance_of_the_extremes() -> None:
    assert cell([1.0, 2.0, 4.5], ".1f") == "2.5 ± 1.8"
    assert cell([0.5, float("nan")]) == "+0.500 ± 0.000 (1 of 2)"
    assert cell([float("nan")]) == "not reached"


def test_a_region_of_a_page_is_filled_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    fill(page, "a", "new \\1")
    fill(page, "b", "nowhere")
    assert page.read_text() == "before\n<!-- a -->\nnew \\1\n<!-- end of a -->\nafter\n"


@dataclass(frozen=True)
class Line:
    """One cell of each type."""

    name: str
    number: int
    share: float
    is_known: bool
    perhaps: float | None


def test_lines_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    lines = [Line("1e-3", 3, 1 / 3, True, None), Line('a "b", ÷', -1, 1e-300, False, 0.0)]
    write_csv(tmp_path / "file.csv", Line, lines)
    assert read_csv(tmp_path / "file.csv", Line) == lines
    header, first, second = (tmp_path / "file.csv").read_text(encoding="utf-8").splitlines()
    assert header == "name,number,share,is_known,perhaps,versions"
    assert re.search(r",lightning-replay \S+ torch \S+ lightning \S+ transformers \S+ Python \S+ \w+ CPU \S+$", first)
    assert second.endswith(",")


def test_what_tells_runs_apart_stands_before_what_was_measured() -> None:
    assert [each.name for each in columns(ArmPoint)][:4] == ["seed", "arm", "step", "seconds"]


def test_redraw_refuses_options_that_would_have_no_effect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["budget.py", "--redraw", "--seeds", "0", "--held-out", "3"])
    with pytest.raises(SystemExit):
        parsed("")
    assert "so --held-out, --seeds would have no effect; leave it out." in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["budget.py", "--fill", "page.md", "--redraw"])
    assert parsed("").redraw == FOLDER


def test_redraw_makes_picture_and_table_of_the_csv_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in verdict.SCRIPT.files:
        (tmp_path / f"{name}.csv").write_bytes((FOLDER / f"{name}.csv").read_bytes())
    page = tmp_path / "page.md"
    page.write_text("<!-- verdict -->\n<!-- end of verdict -->\n")
    monkeypatch.setattr(sys, "argv", ["verdict.py", "--redraw", str(tmp_path), "--fill", str(page)])
    experiments.main([verdict.SCRIPT], "")
    assert page.read_text() == f"<!-- verdict -->\n{region('verdict')}\n<!-- end of verdict -->\n"
    assert (tmp_path / "verdict.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 4


@committed(ALONE)
def test_a_table_is_that_of_its_csv_files(script: Script) -> None:
    assert regions({script.name: script.read(FOLDER)}, PAGE) == {script.name: region(script.name)}


@committed(run_all.SCRIPTS)
def test_a_claim_s_tables_are_those_of_its_csv_files(script: Script) -> None:
    reports = {script.name: script.read(FOLDER)}
    assert details(reports) in region("paper details")
    assert summary(reports, "paper/").splitlines()[-1] in region("paper results").splitlines()


@committed([*ALONE, *run_all.SCRIPTS])
def test_every_line_names_a_seed(script: Script) -> None:
    for name, kind in script.files.items():
        assert {"seed", "round"} & {each.name for each in columns(kind)}, name


@committed([*ALONE, *run_all.SCRIPTS])
def test_a_picture_is_drawn_of_its_csv_files(script: Script, tmp_path: Path) -> None:
    figure, (lines, *_) = drawn(script)
    figure.savefig(tmp_path / "drawn.png")
    marks = [line for axis in figure.axes for line in axis.get_lines()]
    dots = [dot for axis in figure.axes for group in axis.collections for dot in group.get_offsets()]
    assert sum(len(line.get_xdata()) for line in marks) + len(dots) >= len({getattr(line, "arm", "") for line in lines})


def curves(axis: Any) -> Counter[int]:
    """How many lines of how many points an axis has, vertical and horizontal ones left out."""
    lengths = Counter(len(line.get_xdata()) for line in axis.get_lines() if line.get_transform() == axis.transData)
    del lengths[0]
    return lengths


def drawn(script: Script) -> tuple[Any, list[list[Any]]]:
    """The picture of a script, and the lines of its files."""
    lines = lines_of(script)
    report: Report = script.report(*lines)
    return report.figure(), lines


def test_all_arms_are_drawn_that_could_be_cheaper() -> None:
    figure, (points,) = drawn(alternatives.SCRIPT)
    labels = [text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()]
    swept = {f"{point.arm}, interpolated" for point in points if point.weight is not None}
    assert sorted(labels[:-1]) == sorted({point.arm for point in points} | swept)


def test_all_budgets_are_drawn() -> None:
    figure, (_, series) = drawn(budget.SCRIPT)
    for index, text in enumerate(("Spanish", "mathematics")):
        runs = Counter((each.learning_rate, each.budget) for each in series if each.text == text)
        for axis in (figure.axes[index], figure.axes[index + 2]):
            assert curves(axis) == Counter(runs.values())


def test_all_arms_of_the_frontier_are_drawn() -> None:
    figure, (ended, timed) = drawn(frontier.SCRIPT)
    arms = {run.arm for run in ended if run.pair == "Spanish"} - {PLAIN}
    assert {len(axis.containers) for axis in figure.axes} == {len(arms)}
    assert arms <= {time.arm for time in timed}


def test_a_price_is_drawn_for_each_model() -> None:
    figure, (cases, prices) = drawn(verdict.SCRIPT)
    assert curves(figure.axes[0]) == Counter(Counter(each.parameters for each in prices).values())
    assert {each.parameters for each in prices} == {case.parameters for case in cases}


def test_a_dot_is_drawn_for_the_end_of_each_run() -> None:
    figure, (points,) = drawn(self_forgetting.SCRIPT)
    dots = [tuple(dot) for dots in figure.axes[0].collections for dot in dots.get_offsets().tolist()]
    ends = {(point.run, point.seed): (point.self_kl, point.forgetting) for point in points}
    assert sorted(dots) == sorted(ends.values())


def test_a_curve_is_drawn_for_each_task_of_the_first_seed() -> None:
    figure, (ends, series) = drawn(task_sequence.SCRIPT)
    for axis, end in zip(figure.axes, ends, strict=False):
        assert axis.get_title("left") == end.arm
        runs = Counter(each.task for each in series if (each.arm, each.seed) == (end.arm, end.seed))
        assert curves(axis) == Counter(runs.values())


COSTS = ["benchmarks/replay_cost.py", "--table", "benchmarks/replay_cost.json"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("instruct", ["instruct.py", "--csv", "instruct.csv", "instruct_spanish.csv"]),
        ("on a gpu", ["benchmarks/on_a_gpu.py", "--table", "benchmarks/on_a_gpu.json"]),
        *((f"cost, {part}", [*COSTS, "--only", part]) for part in ("fit", "sampling", "draw", "growth")),
    ],
)
def test_the_table_of_a_script_is_that_of_its_file(name: str, command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=PAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == region(name)
