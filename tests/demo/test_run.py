import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lightning_replay
from lightning_replay.cli.main import main
from lightning_replay.demo import run as demo
from lightning_replay.demo.toy_tasks import ANSWER, ROW_LENGTH, TASKS, held_out_problems, problems
from lightning_replay.report.run_logs import read_runs
from lightning_replay.report.sequences import joined, matrix_of
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
        "import sys, torchmetrics; from lightning_replay.cli import main; sys.modules['matplotlib'] = None\n"
        "main(['demo', '--output', '/nonexistent'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "pip install 'lightning-replay[demo]'" in run.stderr


def test_no_held_out_problem_is_ever_trained_on() -> None:
    trained_on = {tuple(row) for row in problems("sort", 100_000, torch.Generator().manual_seed(0)).tolist()}
    held_out = {tuple(row) for row in held_out_problems("sort").tolist()}
    assert len(held_out) == 400
    assert len(trained_on) > 9_500
    assert not held_out & trained_on


def learned_quickly(steps: int | None) -> list[demo.Run]:
    """Two arms without replay."""
    return list(demo.learn_sequence({"one": None, "two": None}, 0, Console(file=io.StringIO()), steps).values())


def test_each_line_of_the_progress_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "LEARNED", 0.0)
    monkeypatch.setattr(demo, "COOLDOWN_STEPS", 10)
    demo.learn_sequence({"one": None}, 0, Console(), 5)
    lines = capsys.readouterr().out.splitlines()
    task = demo.MEASURE_EVERY + 10
    ends = [f"all            1/4 reverse  ended after {task} steps: "]
    ends += [f"one            {place}/4 {name:<8} ended after 5 steps: " for place, name in enumerate(TASKS, 1)][1:]
    assert [line[: line.index(":") + 2] for line in lines] == ends


def test_training_ends_after_the_cooldown_and_leaves_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LEARNED", 0.0)  # so each task is learned at the first measurement
    monkeypatch.setattr(demo, "COOLDOWN_STEPS", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        one, two = learned_quickly(None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    task = demo.MEASURE_EVERY + 10
    assert one.ends == two.ends == [task, 2 * task, 3 * task, 4 * task]
    assert one.matrix == two.matrix
    given, _ = learned_quickly(5)
    assert given.ends == [task, task + 5, task + 10, task + 15]
    assert given.steps[-4:] == [task, task + 5, task + 10, task + 15]  # the end of each task is measured


def test_a_task_that_is_not_learned_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "STEPS_AT_MOST", 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(SystemExit, match="1"):
            main(["demo", "--output", str(tmp_path)])
        (said,) = capsys.readouterr().err.splitlines()[-1:]
        assert said.startswith("The model has not learned the task 'reverse' (all) in 5 steps: it answers 0.0%")
        assert said.endswith("Try another seed than 0.")  # a traceback would not help
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert not (tmp_path / "results.json").exists()


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
        assert all(matrix[task][task] >= 0.95 for task in range(len(TASKS)))
    assert max(list(results["without_replay"]["accuracy"].values())[:-1]) <= 0.5
    assert min(results["with_replay"]["accuracy"].values()) >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_that_the_demo_names_shows_each_arm_as_one_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    check(demo.demo(tmp_path), tmp_path)
    printed = capsys.readouterr().out
    assert f"lightning-replay report {tmp_path}" in "".join(printed.split("\n"))
    # Not at a terminal, so a line for each measurement stands where the bars would.
    assert len(re.findall(r" step \d+: reverse +\d+%", printed)) >= 2 * len(TASKS)
    main(["report", str(tmp_path), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(f">after {name}<" in page for name in ("2_sort", "3_increment", "4_swap"))
    runs = {run.name.partition("/")[2]: matrix_of(run) for run in joined(read_runs([tmp_path])[0])}
    assert sorted(runs) == ["with_replay", "without_replay"]
    for arm, matrix in runs.items():
        assert matrix is not None
        assert matrix.sets == list(TASKS)
        assert matrix.learned == [0, 1, 2, 3]
        whole_answers = json.loads((tmp_path / "results.json").read_text())[arm]["accuracy_after_each_task"]
        for tokens, answers in zip(matrix.accuracy, whole_answers, strict=True):
            assert all(a is not None and a >= b for a, b in zip(tokens, answers, strict=True))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(1, 10))
def test_the_demo_keeps_every_task_with_replay(tmp_path: Path, seed: int) -> None:
    main(["demo", "--output", str(tmp_path), "--seed", str(seed)])
    check(json.loads((tmp_path / "results.json").read_text()), tmp_path)
