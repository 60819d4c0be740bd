"""How well a budget of forgetting is held, what its price predicts, and how it compares with fixed coefficients.

    python examples/paper/budget.py --model DIR --prior known.txt --new new.txt --other another.txt

`run_all.py` leaves it out. Takes two hours on two cores for a model of 650,000 parameters, by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from statistics import mean
from typing import Any

from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, cell, count, plain_numbers, scientific
from runs import Finetuning, Text, Trajectory, forgetting, trajectory

from lightning_replay import ForgettingBudget
from lightning_replay.report.plots import Look
from lightning_replay.utilities.tables import markdown

SETTLED = 50
"""Steps after which the drift is not to exceed its budget by far."""
MORE = 1.2
"""How much larger the budget is that the price is held against."""
SPACING = 5
"""Steps between the points of the picture's curves."""
COEFFICIENTS = (0.3, 1.0, 3.0, 10.0, 30.0)
"""The fixed ones."""


@dataclass(frozen=True)
class Held:
    """A run with a budget: a line of the CSV file.

    Attributes:
        text: The name of the new text.
        learning_rate: Of the run.
        budget: In nats a token.
        seed: Of the run.
        steps: Of the run.
        drift_last_quarter: The mean drift over that part of the run.
        highest_drift: The highest smoothed drift once it has settled.
        new_loss: The last new-task loss.
        forgetting: The rise of the prior loss.
        best_fixed_forgetting: What the best fixed coefficient has forgotten when it reaches the same new-task loss;
            NaN if none reaches it, None if there are no such runs.
        price: The last price.
        new_loss_with_larger_budget: The last new-task loss with a budget ``MORE`` times as large, if that was run.
    """

    text: str
    learning_rate: float
    budget: float
    seed: int
    steps: int
    drift_last_quarter: float
    highest_drift: float
    new_loss: float
    forgetting: float
    best_fixed_forgetting: float | None
    price: float
    new_loss_with_larger_budget: float | None

    @property
    def end(self) -> float:
        """The drift at the end, relative to the budget."""
        return self.drift_last_quarter / self.budget

    @property
    def peak(self) -> float:
        """The highest drift, relative to the budget."""
        return self.highest_drift / self.budget

    @property
    def bought(self) -> float | None:
        """Nats of new-task loss that a nat of drift buys, as measured with the larger budget."""
        larger = self.new_loss_with_larger_budget
        return None if larger is None else (self.new_loss - larger) / ((MORE - 1) * self.budget)


@dataclass(frozen=True)
class Logged:
    """What a run with a budget logged after a step, for the picture.

    Attributes:
        text: The name of the new text.
        learning_rate: Of the run.
        budget: In nats a token.
        seed: Of the run.
        step: Optimizer steps so far.
        drift: The smoothed one.
        coefficient: In use.
    """

    text: str
    learning_rate: float
    budget: float
    seed: int
    step: int
    drift: float
    coefficient: float


def held(
    text: str,
    rate: float,
    budget: float,
    seed: int,
    result: Mapping[str, Any],
    larger: Mapping[str, Any] | None,
    fixed: Sequence[Trajectory],
) -> Held:
    """The line of a run.

    Args:
        text: The name of the new text.
        rate: The learning rate.
        budget: In nats a token.
        seed: Of the run.
        result: Of the run.
        larger: That of the run with the larger budget, if any.
        fixed: What was measured in runs with fixed coefficients, if any.
    """
    drift: list[float] = result["budget"]["replay/drift"]
    there = [forgetting(run, new_loss(result)) for run in fixed]
    return Held(
        text=text,
        learning_rate=rate,
        budget=budget,
        seed=seed,
        steps=len(drift),
        drift_last_quarter=mean(drift[len(drift) * 3 // 4 :]),
        highest_drift=max(drift[SETTLED:]),
        new_loss=new_loss(result),
        forgetting=forgetting(trajectory(result)),
        best_fixed_forgetting=min((value for value in there if not isnan(value)), default=nan) if fixed else None,
        price=price(result),
        new_loss_with_larger_budget=None if larger is None else new_loss(larger),
    )


def logged(run: Held, result: Mapping[str, Any]) -> list[Logged]:
    """What the run of a line logged, every ``SPACING`` steps, to four digits."""
    series = zip(*(result["budget"][f"replay/{name}"] for name in ("drift", "coefficient")), strict=True)
    return [
        Logged(run.text, run.learning_rate, run.budget, run.seed, step, *(float(f"{value:.4g}") for value in values))
        for step, values in enumerate(series, 1)
        if step % SPACING == 1
    ]


def new_loss(result: Mapping[str, Any]) -> float:
    """The last new-task loss of a run."""
    return float(result["points"][-1]["new_loss"])


def price(result: Mapping[str, Any]) -> float:
    """The last price of a run."""
    return float(result["budget"]["replay/price"][-1])


def measure(lab: Lab) -> dict[str, Sequence[Held | Logged]]:
    """Finetune with budgets and with fixed coefficients."""
    scale = lab.scale
    texts, budgets = {"Spanish": lab.new, "mathematics": lab.other}, sorted(scale.budgets)

    def run(text: Text, seed: int, coefficient: float | ForgettingBudget, rate: float, every: int) -> Finetuning:
        replay = {"loss": "kl", "coefficient": coefficient}
        return lab.finetuning(seed, new=text, learning_rate=rate, steps=scale.budget_steps, every=every, replay=replay)

    ends, often = max(1, scale.budget_steps // 4), max(1, scale.budget_steps // 12)
    middle = scale.budget_rates[len(scale.budget_rates) // 2]
    runs: dict[tuple[Any, ...], Finetuning] = {
        (name, rate, allowed, seed): run(text, seed, ForgettingBudget(allowed), rate, ends)
        for seed in lab.seeds
        for name, text in texts.items()
        for rate in scale.budget_rates
        for allowed in (*budgets, *(MORE * each for each in budgets if text == lab.new and rate == middle))
    }
    runs |= {
        (name, coefficient, seed): run(text, seed, coefficient, middle, often)
        for seed in lab.seeds
        for name, text in texts.items()
        if text == lab.new
        for coefficient in COEFFICIENTS
    }
    results = lab.done(runs)

    lines: list[Held] = []
    series: list[Logged] = []
    for name in texts:
        fixed = {
            seed: [trajectory(results[name, each, seed]) for each in COEFFICIENTS if (name, each, seed) in results]
            for seed in lab.seeds
        }
        for rate in scale.budget_rates:
            for allowed in budgets:
                found = {
                    seed: results[name, rate, allowed, seed]
                    for seed in lab.seeds
                    if (name, rate, allowed, seed) in results
                }
                for seed, result in found.items():
                    larger = results.get((name, rate, MORE * allowed, seed))
                    lines.append(held(name, rate, allowed, seed, result, larger, fixed[seed] if rate == middle else []))
                    if seed == next(iter(found)):
                        series += logged(lines[-1], result)
    return {"budget": lines, "budget_series": series}


def report(lines: Sequence[Held], series: Sequence[Logged]) -> Report:
    """Say how well the budgets were held."""
    texts, rates = (list(dict.fromkeys(getattr(line, name) for line in lines)) for name in ("text", "learning_rate"))
    budgets = sorted({line.budget for line in lines})
    groups: dict[tuple[str, float, float], list[Held]] = {}
    for line in lines:
        groups.setdefault((line.text, line.learning_rate, line.budget), []).append(line)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, len(texts), sharex=True, sharey="row", squeeze=False)
        for text, rate, budget in groups:
            above, below = axes[:, texts.index(text)]
            points = [each for each in series if (each.text, each.learning_rate, each.budget) == (text, rate, budget)]
            steps = [each.step for each in points]
            dashes = [(), (4.0, 2.0), (1.0, 1.5)][rates.index(rate) % 3]
            look = {**Look.of(budgets.index(budget)).line(), "dashes": dashes, "linewidth": 1.0}
            above.plot(steps, [each.drift / budget for each in points], **look)
            label = f"{budget:g} at {scientific(rate)}"
            below.plot(steps, [each.coefficient for each in points], label=label, **look)
        for text, (above, below) in zip(texts, axes.T, strict=True):
            above.axhline(1.0, color="black", linewidth=0.8, alpha=0.5)
            above.set_title(text)
            below.set(xlabel="optimizer steps", yscale="log")
            plain_numbers(below.yaxis)
        axes[0, 0].set_ylabel("drift ÷ budget")
        axes[1, 0].set_ylabel("coefficient")
        figure.legend(
            *axes[1, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, title="budget"
        )

    return Report(
        claim="A budget of forgetting is held",
        experiment=f"Budgets {', '.join(f'{each:g}' for each in budgets)} at learning rates "
        f"{', '.join(map(scientific, rates))}, {lines[0].steps} steps, {count((line.seed for line in lines), 'seed')}",
        paper="",
        ours=f"drift ÷ budget over the last quarter: {cell([line.end for line in lines], '.2f')}; "
        f"highest after step {SETTLED}: {max(line.peak for line in lines):.2f}",
        details=markdown(
            [
                "new text",
                "learning rate",
                "budget",
                "seeds",
                "drift ÷ budget, last quarter",
                f"highest after step {SETTLED}",
                "new-task loss",
                "forgetting",
                "the best fixed coefficient's there",
                "price",
                f"measured, up to {MORE:g} × the budget",
            ],
            [cells(runs) for runs in groups.values()],
        ),
        draw=draw,
        size=(9.5, 5.5),
    )


def cells(runs: Sequence[Held]) -> list[str]:
    """The line of the table for runs that differ in their seeds."""
    fixed = [run.best_fixed_forgetting for run in runs]
    exchanges = [(run.price, run.bought) for run in runs if run.bought is not None]
    return [
        runs[0].text,
        scientific(runs[0].learning_rate),
        f"{runs[0].budget:g}",
        str(len(runs)),
        cell([run.end for run in runs], ".2f"),
        cell([run.peak for run in runs], ".2f"),
        cell([run.new_loss for run in runs], ".2f"),
        cell([run.forgetting for run in runs]),
        cell([nan if each is None else each for each in fixed]) if any(each is not None for each in fixed) else "",
        *([cell(values, ".1f") for values in zip(*exchanges, strict=True)] or ["", ""]),
    ]


SCRIPT = Script({"budget": Held, "budget_series": Logged}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
