import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_replay
from lightning_replay.cli.main import main
from lightning_replay.demo import run as demo
from lightning_replay.demo.toy_tasks import ANSWER, ROW_LENGTH, TASKS, problems
from lightning_replay.utilities import progress


@pytest.mark.parametrize("task", TASKS)
def test_problems_have_right_answers(task: str) -> None:
    solvers: dict[str, Callable[[list[int]], list[int]]] = {
        "reverse": lambda digits: digits[::-1],
        "sort": sorted,
        "increment": lambda digits: [(digit + 1) % 10 for digit in digits],
        "swap": lambda digits: digits[2:] + digits[:2],
    }
    for row in problems(task, 50, torch.Generator().manual_seed(0)).tolist():
        assert len(row) == ROW_LENGTH
        digits = row[1:3] + row[4:6]
        assert row[ANSWER] == [*solvers[task](digits), 12]
        assert row[0] == 13 + list(TASKS).index(task)


def test_the_command_tells_its_version_and_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"lightning-replay {lightning_replay.__version__}"
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "demo" in capsys.readouterr().err


def test_without_its_extra_the_demo_names_the_command_that_installs_it() -> None:
    code = (
        "import sys; from lightning_replay.cli import main; sys.modules['matplotlib'] = None\n"
        "main(['demo', '--output', '/nonexistent'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "pip install 'lightning-replay[demo]'" in run.stderr


def check(results: dict[str, Any], output: Path) -> None:
    """What holds of every run of the demo."""
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for arm in (results["without_replay"], results["with_replay"]):
        matrix = arm["accuracy_after_each_task"]
        assert matrix[0][0] >= 0.99
        assert list(arm["accuracy"]) == list(TASKS)
        assert list(arm["accuracy"].values()) == matrix[-1]
        assert arm["average_accuracy"] == pytest.approx(sum(matrix[-1]) / len(TASKS))
        changes = [matrix[-1][task] - matrix[task][task] for task in range(len(TASKS) - 1)]
        assert arm["backward_transfer"] == pytest.approx(sum(changes) / len(changes))
        assert arm["seconds"] > 0
    earlier = [results["without_replay"]["accuracy"][task] for task in list(TASKS)[:-1]]
    assert sum(earlier) / len(earlier) <= 0.5


@pytest.mark.slow
def test_a_short_demo_forgets_less_with_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STEPS", 60)
    results = demo.demo(tmp_path)
    check(results, tmp_path)
    first = next(iter(TASKS))
    assert results["without_replay"]["accuracy"][first] < 0.2
    assert results["with_replay"]["accuracy"][first] > 0.5


@pytest.mark.slow
def test_the_page_that_the_demo_names_shows_each_fit_after_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "STEPS", 5)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    results = demo.demo(tmp_path)
    # The last task's accuracy is measured at its end, which is not one of the steps that are measured anyway.
    after = results["without_replay"]["accuracy_after_each_task"]
    assert after[0] != after[1] != after[2] != after[3]
    printed = capsys.readouterr().out
    assert f"lightning-replay report {tmp_path}" in "".join(printed.split("\n"))
    # Not at a terminal, so a line for each measurement stands where the bars would.
    assert len(re.findall(r" step \d+: reverse +\d+%", printed)) >= 2 * len(TASKS)
    main(["report", str(tmp_path), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.html").read_text()
    for arm in ("without_replay", "with_replay"):
        for name in ("2_sort", "3_increment", "4_swap"):
            assert f"{arm}/{name}" in page
    logged = (tmp_path / "logs" / "without_replay" / "4_swap" / "metrics.csv").read_text().splitlines()
    assert {"forgetting/reverse", "forgetting/sort", "forgetting/increment"} <= set(logged[0].split(","))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_keeps_every_task_with_replay(tmp_path: Path, seed: int) -> None:
    main(["demo", "--output", str(tmp_path), "--seed", str(seed)])
    results = json.loads((tmp_path / "results.json").read_text())
    check(results, tmp_path)
    assert min(results["with_replay"]["accuracy"].values()) >= 0.95
