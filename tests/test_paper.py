"""The scripts that try the paper's claims."""

import csv
import importlib
import importlib.metadata
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from alternative_runs import Alternative, Pull, fisher_information
from alternatives import DEFAULT
from alternatives import PAPER as PAPERS
from arms import PLAIN, at_one_loss, difference, loss_after, removed
from budget import held
from experiments import QUICK, perform
from frontier_arms import FEW, LONG, TELLING, all_arms
from lightning.pytorch import Trainer
from objectives import OBJECTIVES
from reports import cell
from runs import Finetuning, Point, Pretraining, Text, Trajectory, at_new_loss, forgetting
from scipy.stats import spearmanr
from transformers import LlamaForCausalLM
from verdict import Case, verdict_at_end

from lightning_replay import CausalLM, forward_kl, sample_rows
from lightning_replay.models.language_model import find_language_model

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


def test_a_budget_is_held_against_a_larger_one_and_against_fixed_coefficients() -> None:
    def run(drifts: list[float], price: float, *losses: tuple[float, float]) -> dict[str, Any]:
        points = [vars(Point(step, 0, 0, 0, prior, 0, new, 0, 0)) for step, (prior, new) in enumerate(losses)]
        return {"budget": {"replay/drift": drifts, "replay/price": [99.0, price]}, "points": points}

    def fixed(*losses: tuple[float, float]) -> list[Point]:
        return [Point(step, 0, 0, 0, prior, 0, new, 0, 0) for step, (prior, new) in enumerate(losses)]

    small = run([0.5] * 50 + [0.12] * 30 + [0.06] * 20 + [0.1] * 5, 8.0, (2.0, 9.0), (2.1, 3.0))
    large = run([0.2], 2.0, (2.0, 9.0), (2.2, 2.9))
    coefficients = [fixed((2.0, 9.0), (2.4, 1.0)), fixed((2.0, 9.0), (2.5, 5.0), (2.6, 2.0)), fixed((2.0, 9.0), (2, 8))]
    first = held("Spanish", 1e-3, 0.1, 0, small, large, coefficients)
    assert first.peak == pytest.approx(1.2)
    assert first.end == pytest.approx((0.12 * 2 + 0.06 * 20 + 0.1 * 5) / 27 / 0.1)
    assert (first.price, first.bought) == pytest.approx((8.0, (3.0 - 2.9) / 0.02))
    # The first is there at three quarters of its way; the last does not get there.
    assert first.best_fixed_forgetting == pytest.approx(0.3)
    alone = held("Spanish", 1e-3, 0.1, 1, small, None, coefficients[2:])
    assert alone.bought is None
    assert alone.best_fixed_forgetting != alone.best_fixed_forgetting
    assert held("Spanish", 1e-3, 0.1, 2, small, None, []).best_fixed_forgetting is None


def test_a_verdict_is_right_if_the_runs_that_it_speaks_of_gained_what_it_says() -> None:
    def case(steps: float, more: float, losses: list[float], drift: float = 0.1) -> Case:
        told = verdict_at_end({"train/loss": losses, "replay/drift": [drift], "replay/price": [2.0]}, 0.1)
        return Case(16, 9000, 0, 1.5, 0.1, 600, 6.0, 4.0, 2.0, steps, more, None, told.helps, told.sentence)

    falling = [6.0 - 0.3 * math.log(step + 1) for step in range(600)]
    flat = [6.0, *[4.0] * 600]
    assert case(0.2, 0.0, falling).counts_from == pytest.approx(0.04)
    found = [case(0.2, 0.0, falling), case(0.01, 0.2, flat), case(0.0, 0.01, flat), case(0.05, 0.0, flat, 0.01)]
    assert [each.would_help for each in found] == ["steps", "room", "nothing", "steps"]
    assert [each.verdict for each in found] == ["steps", "nothing", "nothing", "nothing"]
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

    pictures = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert sorted(f"{name}.py" for name in pictures) == CLAIMS
    filled = page.read_text()
    page.write_text("<!-- paper results -->\n<!-- end of paper results -->\n")
    subprocess.run(
        [sys.executable, str(PAPER / "run_all.py"), "--redraw", str(tmp_path), "--fill", str(page)], check=True
    )
    assert page.read_text() == filled
    assert {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")} == pictures

    lines = {path.stem: list(csv.DictReader(path.open())) for path in tmp_path.glob("*.csv")}
    assert sorted(f"{name}.py" for name in lines if name != "task_sequence_curves") == CLAIMS
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


@pytest.fixture
def tiny(tmp_path: Path, pretraining: Pretraining) -> Alternative:
    """A short finetuning of a tiny model."""
    new = tmp_path / "new.txt"
    new.write_text("el gato está en la mesa. " * 200)
    model = replace(pretraining, steps=5).run(tmp_path)["kept"]["5"]
    return Alternative(model, pretraining.text, Text(str(new)), 0, 1e-2, 4, 2, rows=8, length=32, held_out=8)


def test_an_interpolation_ends_at_the_finetuned_model_and_begins_at_the_one_before(
    tmp_path: Path, tiny: Alternative
) -> None:
    result = replace(tiny, sweep=(0.0, 0.5, 1.0)).run(tmp_path)
    ends, losses = (result["points"][0], result["points"][-1]), ("new_loss", "prior_loss")
    # Lightning keeps what is logged in 32 bits.
    assert [[np.float32(result["sweep"][place][loss]) for loss in losses] for place in (0, 2)] == [
        [end[loss] for loss in losses] for end in ends
    ]
    assert ends[1]["new_loss"] < result["sweep"][1]["new_loss"] < ends[0]["new_loss"]
    assert result["bytes"] == pytest.approx(4 * 4 * Pretraining(tiny.prior, 16, 0, 1, 1).parameters, rel=0.01)


def test_each_alternative_trains_what_it_says(tmp_path: Path, tiny: Alternative) -> None:
    model = str(tmp_path / tiny.model)
    changes: list[dict[str, Any]] = [{"freeze": True}, {"osf": 0.5}, {"lora_rank": 2, "embeddings": True}]
    frozen, adapted, whole = (replace(tiny, **change)._network(model) for change in changes)
    trained = {name for name, weight in frozen.named_parameters() if weight.requires_grad}
    assert trained == {name for name in dict(frozen.named_parameters()) if "layers.1." in name} | {"model.norm.weight"}
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.osf_svd_params["default"]["S_low"].shape == (8,)
    trained = {name for name, weight in whole.named_parameters() if weight.requires_grad and "lora" not in name}
    assert trained == {"base_model.model.model.embed_tokens.modules_to_save.default.weight"}
    tied = [whole.get_base_model().get_input_embeddings(), whole.get_base_model().get_output_embeddings()]
    assert tied[0].weight is tied[1].weight


def test_a_pull_adds_the_gradient_of_its_penalty(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    module, before = CausalLM(tiny_llama(seed=1)), tiny_llama(seed=2)
    pull = Pull(0.3, 8, 0, fisher=True)
    pull.first = [weight.detach() for weight in before.parameters()]
    pull.importances = [torch.rand_like(weight) for weight in before.parameters()]
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    pull.on_before_optimizer_step(Trainer(logger=False), module, None)
    penalty = torch.stack(
        [
            (importance * (weight - first).square()).sum()
            for weight, first, importance in zip(module.parameters(), pull.first, pull.importances, strict=True)
        ]
    ).sum()
    for weight, expected in zip(
        module.parameters(), torch.autograd.grad(0.15 * penalty, list(module.parameters())), strict=True
    ):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected)


def test_the_fisher_information_is_the_curvature_of_the_divergence(
    tiny_llama: Callable[..., LlamaForCausalLM],
) -> None:
    model = tiny_llama(initializer_range=0.3)
    described = find_language_model(model, None)
    rows = sample_rows(described, [[1]] * 2000, 8, torch.Generator().manual_seed(0)).tokens
    information = dict(zip(dict(model.named_parameters()), fisher_information(model, rows), strict=True))
    with torch.no_grad():
        before = model(rows).logits[:, :-1]
        weight, step = model.model.norm.weight, 0.02
        weight[3] += step
        divergence = float(forward_kl(model(rows).logits[:, :-1], before))
    assert divergence / (step**2 / 2) == pytest.approx(float(information["model.norm.weight"][3]), rel=0.1)


@pytest.fixture
def avalanche_ewc(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Avalanche's EWC alone: importing all of the package takes torchvision."""
    try:
        folder = Path(str(importlib.metadata.distribution("avalanche-lib").locate_file("avalanche")))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("compares with Avalanche: pip install --no-deps avalanche-lib")
    stands_for: dict[str, dict[str, Any]] = {
        "avalanche": {},
        "avalanche.benchmarks": {"OnlineCLExperience": object},
        "avalanche.models": {},
        "avalanche.models.utils": {"avalanche_forward": lambda model, x, task_labels: model(x)},
        "avalanche.training": {},
        "avalanche.training.plugins": {},
        "avalanche.training.plugins.strategy_plugin": {"SupervisedPlugin": object},
    }
    for name, names in stands_for.items():
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        vars(package).update(names)
        monkeypatch.setitem(sys.modules, name, package)
    yield importlib.import_module("avalanche.training.plugins.ewc").EWCPlugin
    for name in [name for name in sys.modules if name.startswith("avalanche.")]:
        del sys.modules[name]


@pytest.mark.integration
def test_fisher_information_and_penalty_are_avalanche_s(
    tiny_llama: Callable[..., LlamaForCausalLM], avalanche_ewc: Any
) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(tokens).logits[:, :-1].flatten(0, 1)
            return logits

    model, rows = Logits(), torch.randint(32, (6, 9))
    plugin = avalanche_ewc(ewc_lambda=0.7)
    dataset = [(row, row[1:], 0) for row in rows]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = plugin.compute_importances(
        model, lambda logits, y: torch.nn.functional.cross_entropy(logits, y.flatten()), optimizer, dataset, "cpu", 1
    )
    ours = fisher_information(model.model, rows)
    for name, information in zip(theirs, ours, strict=True):
        torch.testing.assert_close(information, theirs[name].data * 8)  # a token's share: theirs is of mean losses

    before = [weight.detach().clone() for weight in model.parameters()]
    plugin.importances[0], plugin.saved_params[0] = (
        theirs,
        {
            name: SimpleNamespace(expand=lambda shape, kept=kept: kept)
            for name, kept in zip(theirs, before, strict=True)
        },
    )
    optimizer.zero_grad()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1)
    strategy = SimpleNamespace(
        clock=SimpleNamespace(train_exp_counter=1), model=model, device="cpu", loss=torch.zeros(())
    )
    plugin.before_backward(strategy)
    expected = torch.autograd.grad(strategy.loss, list(model.parameters()))
    module = CausalLM(model.model)
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    pull = Pull(2 * 0.7 / 8, 9, 0, fisher=True)  # they leave out the half
    pull.first, pull.importances = before, ours
    pull.on_before_optimizer_step(Trainer(logger=False), module, None)
    for weight, gradient in zip(module.parameters(), expected, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient)


@pytest.mark.slow
def test_alternatives_to_replay_are_compared_without_any_data(tmp_path: Path) -> None:
    script = str(PAPER / "alternatives.py")
    command = [sys.executable, script, "--quick", "--workers", "1", "--output", str(tmp_path)]
    subprocess.run([*command, "--steps", "3", "--every", "1", "--seeds", "0", "1"], check=True)

    with (tmp_path / "alternatives.csv").open() as file:
        lines = list(csv.DictReader(file))
    kept = [line for line in lines if line["chosen"] == "True"]
    assert {line["seed"] for line in kept} == {"0", "1"}
    assert {line["seed"] for line in lines if line["chosen"] == "False"} == {"0"}
    fits = [line for line in kept if not line["weight"]]
    ends: dict[tuple[str, str], dict[str, str]] = {(line["arm"], line["seed"]): line for line in fits}
    level = max(float(ends[arm, seed]["new_loss"]) for arm in (DEFAULT, PAPERS) for seed in "01")

    table = [line.split(" | ") for line in (tmp_path / "alternatives.md").read_text().splitlines()]
    shown = {cells[0].removeprefix("| "): cells for cells in table if len(cells) == 9}
    arms = {line["arm"] for line in kept}
    assert arms <= shown.keys()
    assert len(shown) == 2 + len(arms) + 2  # header and rule; two interpolations
    assert shown["arm"][2] == f"forgetting at {level:.2f}"
    assert shown["L2-SP"][-1] == "1.25 |"
    assert shown["EWC"][-1] == "1.50 |"

    def forgotten(arm: str, seed: str, sweep: bool) -> float:
        points = [line for line in kept if (line["arm"], line["seed"], bool(line["weight"])) == (arm, seed, sweep)]
        losses, prior = ([float(line[name]) for line in points] for name in ("new_loss", "prior_loss"))
        return float(np.interp(-level, [-loss for loss in losses], prior)) - prior[0]

    for arm, row, sweep in ((PAPERS, PAPERS, False), (PLAIN, f"{PLAIN}, interpolated", True)):
        ours = [forgotten(arm, seed, sweep) for seed in "01"]
        theirs = [forgotten(PLAIN, seed, False) for seed in "01"]
        assert shown[row][2] == cell(ours)
        assert shown[row][3] == cell([1 - our / their for our, their in zip(ours, theirs, strict=True)], ".1%")
    assert (tmp_path / "alternatives.png").read_bytes().startswith(b"\x89PNG")
