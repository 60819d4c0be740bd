"""The scripts that try the paper's claims."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from arms import PLAIN, at_one_loss, difference, loss_after, removed
from budget import Held
from capacity import Start
from experiments import QUICK, cell, fill, perform
from frontier import FEW, LONG, TELLING, all_arms
from objectives import OBJECTIVES
from runs import Finetuning, Point, Pretraining, Text, Trajectory, at_new_loss, forgetting
from scipy.stats import spearmanr
from verdict import Case

PAPER = Path(__file__).parents[1] / "examples" / "paper"
CLAIMS = [
    "capacity.py",
    "coefficients.py",
    "drift.py",
    "learning_rate.py",
    "methods.py",
    "other_text.py",
    "task_sequence.py",
]


def trajectory(*losses: tuple[float, float]) -> Trajectory:
    """Points 10 steps apart with these new-task and prior losses."""
    return [Point(10 * i, float(i), float(i), 0, prior, 0.0, new, 0.0, 0.0) for i, (new, prior) in enumerate(losses)]


def test_a_value_at_a_new_task_loss_lies_between_the_measurements_around_it() -> None:
    run = trajectory((8.0, 3.0), (6.0, 3.2), (4.0, 4.0), (5.0, 9.0), (3.0, 5.0))
    assert at_new_loss(run, 5.0, "prior_loss") == pytest.approx(3.6)  # half the way, and the first passage counts
    assert at_new_loss(run, 4.5, "step") == pytest.approx(17.5)
    assert forgetting(run, 5.0) == pytest.approx(0.6)
    assert forgetting(run) == pytest.approx(2.0)
    assert at_new_loss(run, 2.0, "prior_loss") != at_new_loss(run, 2.0, "prior_loss")  # never reached
    assert loss_after(run, 5.0) == pytest.approx(7.0)


def test_arms_are_compared_at_the_lowest_new_task_loss_that_both_reach() -> None:
    plain = trajectory((8.0, 3.0), (4.0, 4.0), (2.0, 5.0))
    slow = trajectory((8.0, 3.0), (5.0, 3.1), (3.0, 3.3))
    assert at_one_loss([slow], [plain])[0] == pytest.approx((0.3, 1.5))
    assert removed([slow], [plain]) == [pytest.approx(0.8)]
    assert difference([plain], [slow]) == [pytest.approx(1.2)]


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


def test_a_budget_is_held_against_a_larger_one_and_against_fixed_coefficients() -> None:
    def run(drifts: list[float], price: float, *losses: tuple[float, float]) -> dict[str, Any]:
        points = [vars(Point(step, 0, 0, 0, prior, 0, new, 0, 0)) for step, (prior, new) in enumerate(losses)]
        return {"budget": {"replay/drift": drifts, "replay/price": [99.0, price]}, "points": points}

    def fixed(*losses: tuple[float, float]) -> list[Point]:
        return [Point(step, 0, 0, 0, prior, 0, new, 0, 0) for step, (prior, new) in enumerate(losses)]

    small = run([0.5] * 50 + [0.12] * 30 + [0.06] * 20 + [0.1] * 5, 8.0, (2.0, 9.0), (2.1, 3.0))
    large = run([0.2], 2.0, (2.0, 9.0), (2.2, 2.9))
    coefficients = [fixed((2.0, 9.0), (2.4, 1.0)), fixed((2.0, 9.0), (2.5, 5.0), (2.6, 2.0)), fixed((2.0, 9.0), (2, 8))]
    held = Held("Spanish", 1e-3, 0.1, {0: small, 1: small}, {0: large}, {0: coefficients})
    assert held.of_each(held.peak) == [pytest.approx(1.2)] * 2
    assert held.of_each(held.end) == [pytest.approx((0.12 * 2 + 0.06 * 20 + 0.1 * 5) / 27 / 0.1)] * 2
    ((told, bought),) = held.exchanges
    assert (told, bought) == pytest.approx((8.0, (3.0 - 2.9) / 0.02))
    there, nowhere = held.against_fixed
    assert there == pytest.approx(0.3)  # the first is there at three quarters of its way; the last does not get there
    assert nowhere != nowhere


def test_a_verdict_is_right_if_the_runs_that_it_speaks_of_gained_what_it_says() -> None:
    def case(steps: float, more: float, losses: list[float], drift: float = 0.1) -> Case:
        logged = {"train/loss": losses, "replay/drift": [drift], "replay/price": [2.0]}
        result = {"points": [{"new_loss": 6.0}, {"new_loss": 4.0}], "budget": logged}
        return Case(Start("", 16, 0, 9000, 1, 1.0), 0.1, result, steps, more, None)

    falling = [6.0 - 0.3 * math.log(step + 1) for step in range(600)]
    flat = [6.0, *[4.0] * 600]
    assert case(0.2, 0.0, falling).least == pytest.approx(0.04)
    found = [case(0.2, 0.0, falling), case(0.01, 0.2, flat), case(0.0, 0.01, flat), case(0.05, 0.0, flat, 0.01)]
    assert [each.truth for each in found] == ["steps", "room", "nothing", "steps"]
    assert [each.verdict.helps for each in found] == ["steps", "nothing", "nothing", "nothing"]
    assert [each.is_right for each in found] == [True, False, True, False]
    assert [each.is_clear for each in found] == [True, True, True, False]  # 0.05 is within 1.5 times of 0.04


@pytest.fixture
def pretraining(tmp_path: Path) -> Pretraining:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    return Pretraining(Text(str(text)), 16, 0, 40, 5, rows=8, length=32, held_out=8)


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path, pretraining: Pretraining) -> None:
    result = perform(pretraining, tmp_path)
    (file,) = (tmp_path / "runs").iterdir()
    assert json.loads(file.read_text()) == result
    file.write_text('{"points": "kept"}')
    assert perform(pretraining, tmp_path) == {"points": "kept"}
    assert replace(pretraining, seed=1).key != pretraining.key


def test_a_run_ends_at_the_first_measurement_at_its_level(tmp_path: Path, pretraining: Pretraining) -> None:
    losses = {point["step"]: point["prior_loss"] for point in pretraining.run(tmp_path)["points"]}
    level = (losses[15] + losses[20]) / 2
    ended = replace(pretraining, until=level).run(tmp_path)
    assert [point["step"] for point in ended["points"]] == [0, 1, 2, 3, 4, 5, 10, 15, 20]
    assert list(ended["kept"]) == ["20"]
    new = replace(pretraining.text, data=str(tmp_path / "new.txt"))
    Path(new.data).write_text("el gato está en la mesa. " * 200)
    finetuning = Finetuning(ended["kept"]["20"], pretraining.text, new, 0, 1e-3, 5, 5, rows=8, length=32, held_out=8)
    first = finetuning.run(tmp_path)["points"][0]
    assert first["prior_loss"] == pytest.approx(losses[20])  # the model that was kept
    assert first["prior_kl"] == 0


@pytest.mark.slow
def test_replay_removes_nearly_all_forgetting_of_a_pretrained_model(real_data: Path, tmp_path: Path) -> None:
    text = real_data / "text"
    plain = Finetuning(
        str(real_data / "tinystories-656k"),
        Text(str(text / "tinystories.txt"), separator="<|endoftext|>"),
        Text(str(text / "europarl.es.txt")),
        seed=0,
        learning_rate=1e-3,
        steps=100,
        every=25,
        held_out=96,
    )
    replayed = replace(plain, replay={"loss": "kl", "coefficient": 10.0})
    ours, theirs = ([Point(**point) for point in run.run(tmp_path)["points"]] for run in (replayed, plain))
    (pair,) = at_one_loss([ours], [theirs])
    assert pair[1] > 0.3
    assert 1 - pair[0] / pair[1] >= 0.95


@pytest.mark.slow
def test_all_claims_are_tried_without_any_data(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- paper results -->\n<!-- end of paper results -->\n")
    command = [sys.executable, str(PAPER / "run_all.py"), "--quick", "--workers", "1", "--output", str(tmp_path)]
    subprocess.run([*command, "--fill", str(page)], check=True)

    lines = {path.stem: list(csv.DictReader(path.open())) for path in tmp_path.glob("*.csv")}
    assert sorted(f"{name}.py" for name in lines) == CLAIMS
    assert sorted(f"{path.stem}.py" for path in tmp_path.glob("*.png")) == CLAIMS
    assert all(f"[`{script}`]" in page.read_text() for script in CLAIMS)
    assert [line["step"] for line in lines["methods"] if line["arm"] == PLAIN] == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "10",
        "15",
    ]
    assert len({line["arm"] for line in lines["methods"]}) == 8
    assert len({line["arm"] for line in lines["other_text"]}) == 7
    assert len({line["arm"] for line in lines["coefficients"]}) == 11
    assert {line["width"] for line in lines["capacity"]} == {"16", "32"}
    assert {line["coefficient"] for line in lines["capacity"]} == {"0.0", "0.3", "1.0", "3.0", "10.0"}
    assert {line["replay_fraction"] for line in lines["learning_rate"]} == {"0.0", "0.05", "0.1", "0.2"}
    assert [line["arm"] for line in lines["task_sequence"]] == ["no replay", "self-generated replay"]
    ends = {line["run"]: float(line["forgetting"]) for line in lines["drift"]}
    for arm in ("KL × 10", PLAIN):
        losses = [float(line["prior_loss"]) for line in lines["methods"] if line["arm"] == arm]
        assert ends[arm] == pytest.approx(losses[-1] - losses[0])


@pytest.mark.slow
def test_verdicts_are_tried_without_any_data(tmp_path: Path) -> None:
    command = [sys.executable, str(PAPER / "verdict.py"), "--quick", "--workers", "1", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    with (tmp_path / "verdict.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["width"], line["budget"]) for line in lines] == [("16", "0.1"), ("32", "0.1")]
    assert all(line["verdict"] in ("steps", "room", "nothing", "unknown") for line in lines)
    assert float(lines[0]["gain_with_larger_model"]) == pytest.approx(
        float(lines[0]["new_loss"]) - float(lines[1]["new_loss"])
    )


@pytest.mark.slow
def test_budgets_are_tried_without_any_data(tmp_path: Path) -> None:
    command = [sys.executable, str(PAPER / "budget.py"), "--quick", "--workers", "1", "--output", str(tmp_path)]
    subprocess.run(command, check=True)

    with (tmp_path / "budget.csv").open() as file:
        lines = list(csv.DictReader(file))
    told = [(line["text"], line["budget"]) for line in lines]
    assert told == [(text, budget) for text in ("Spanish", "mathematics") for budget in ("0.05", "0.1")]
    cells = (tmp_path / "budget.md").read_text().split("| Spanish | 1e-2 | 0.05 | ")[1].split(" | ")
    assert cells[1] == cell([float(lines[0]["drift_last_quarter"]) / 0.05], ".2f")
    assert cells[4] == cell([float(lines[0]["forgetting"])])
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_single_script_compares_all_objectives(tmp_path: Path) -> None:
    command = [sys.executable, str(PAPER / "objectives.py"), "--quick", "--workers", "1", "--output", str(tmp_path)]
    subprocess.run([*command, "--steps", "2", "--every", "2"], check=True)

    with (tmp_path / "objectives.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(dict.fromkeys(line["arm"] for line in lines)) == list(OBJECTIVES)
    assert len({line["prior_loss"] for line in lines if line["step"] == "0"}) == 1  # all begin with one model
    table = [line.split(" | ") for line in (tmp_path / "objectives.md").read_text().splitlines()]
    shown = {cells[0].removeprefix("| "): cells[2] for cells in table if len(cells) == 5}
    for arm in OBJECTIVES:
        losses = [float(line["prior_loss"]) for line in lines if line["arm"] == arm]
        assert shown[arm] == cell([losses[-1] - losses[0]])
    assert (tmp_path / "objectives.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_forgetting_on_own_samples_is_compared_with_forgetting_on_prior_text(tmp_path: Path) -> None:
    script = str(PAPER / "self_forgetting.py")
    command = [sys.executable, script, "--quick", "--workers", "1", "--output", str(tmp_path)]
    subprocess.run([*command, "--steps", "2", "--every", "2"], check=True)

    with (tmp_path / "self_forgetting.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {float(line["self_kl"]) for line in lines if line["step"] == "0"} == {0.0}
    ends = [line for line in lines if line["step"] == "2"]
    assert len(ends) == len({line["run"] for line in lines}) == 23
    expected = spearmanr(*([float(line[name]) for line in ends] for name in ("self_kl", "forgetting"))).statistic
    table = [line.split(" | ") for line in (tmp_path / "self_forgetting.md").read_text().splitlines()]
    (shown,) = (cells[4] for cells in table if cells[:3] == ["| ends", "all runs", "23"])
    assert float(shown.removesuffix(" |")) == pytest.approx(expected, abs=5e-4)


@pytest.mark.slow
def test_what_replay_keeps_is_compared_with_its_time(tmp_path: Path) -> None:
    command = [sys.executable, str(PAPER / "frontier.py"), "--quick", "--workers", "1", "--output", str(tmp_path)]
    subprocess.run([*command, "--steps", "4", "--time"], check=True)

    arms = all_arms(QUICK.length)
    with (tmp_path / "frontier.csv").open() as file:
        lines = list(csv.DictReader(file))
    pairs = {pair: [line["arm"] for line in lines if line["pair"] == pair] for pair in (line["pair"] for line in lines)}
    assert list(pairs.values()) == [list(arms), list(TELLING), list(FEW), list(LONG)]
    (line,) = (line for line in lines if line["pair"] == "Spanish" and line["arm"] == "0.2, 4 uses")
    assert float(line["replay_tokens_a_step"]) == QUICK.rows * 0.2 / 0.8 * QUICK.length
    assert line["sampled_rows"] == "2"  # 8 rows in 4 steps, each row used 4 times
    plain, ours = (float(line[f"{name}forgetting_at_one_loss"]) for name in ("plain_", ""))
    assert float(line["removed"]) == pytest.approx(1 - ours / plain)

    with (tmp_path / "frontier_times.csv").open() as file:
        times = list(csv.DictReader(file))
    assert sorted(time["arm"] for time in times) == sorted(arms)
    assert all(float(time["seconds"]) > float(time["sampling_seconds"]) for time in times)
    assert all(time["seconds"] == time["plain_seconds"] for time in times if time["arm"] == PLAIN)
    table = [line.split(" | ") for line in (tmp_path / "frontier.md").read_text().splitlines()]
    (cells,) = (cells for cells in table if cells[0] == "| 0.2, 4 uses")
    (time,) = (time for time in times if time["arm"] == "0.2, 4 uses")
    ratio = float(time["seconds"]) / float(time["plain_seconds"])
    assert cells[-1] == f"{ratio:.2f} ({ratio:.2f} to {ratio:.2f}) |"
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
