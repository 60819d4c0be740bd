"""How well a budget of forgetting is held, what its price predicts, and how it compares with fixed coefficients.

    python examples/paper/budget.py --model DIR --prior known.txt --new new.txt --other another.txt

`run_all.py` leaves it out. Takes two hours on two cores for a model of 650,000 parameters, by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from statistics import mean
from typing import Any

from experiments import Lab, Report, cell, count, main, plain_numbers, table
from learning_rate import scientific
from matplotlib.figure import Figure
from runs import Finetuning, Text, Trajectory, forgetting, trajectory

from lightning_replay import ForgettingBudget
from lightning_replay.report.plots import Look

SETTLED = 50
"""Steps after which the drift is not to exceed its budget by far."""
MORE = 1.2
"""How much larger the budget is that the price is held against."""
COEFFICIENTS = (0.3, 1.0, 3.0, 10.0, 30.0)
"""The fixed ones."""


@dataclass(frozen=True)
class Held:
    """Runs with one budget on one text at one learning rate.

    Attributes:
        text: Its name.
        rate: The learning rate.
        budget: In nats a token.
        results: What each run gave, by seed.
        larger: The same with a budget ``MORE`` times as large, for the seeds where there is such a run.
        fixed: The trajectories of runs with fixed coefficients, by seed.
    """

    text: str
    rate: float
    budget: float
    results: Mapping[int, dict[str, Any]]
    larger: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    fixed: Mapping[int, Sequence[Trajectory]] = field(default_factory=dict)

    def of_each(self, figure: Callable[[dict[str, Any]], float]) -> list[float]:
        """A figure of each run."""
        return [figure(result) for result in self.results.values()]

    def end(self, result: dict[str, Any]) -> float:
        """The mean drift over the last quarter, relative to the budget."""
        drift: list[float] = result["budget"]["replay/drift"]
        return mean(drift[len(drift) * 3 // 4 :]) / self.budget

    def peak(self, result: dict[str, Any]) -> float:
        """The highest smoothed drift once it has settled, relative to the budget."""
        drift: list[float] = result["budget"]["replay/drift"]
        return max(drift[SETTLED:]) / self.budget

    @property
    def exchanges(self) -> list[tuple[float, float]]:
        """Nats of new-task loss that a nat of drift buys, by the price and as measured with the larger budget."""
        return [
            (price(result), (new_loss(result) - new_loss(self.larger[seed])) / ((MORE - 1) * self.budget))
            for seed, result in self.results.items()
            if seed in self.larger
        ]

    @property
    def against_fixed(self) -> list[float]:
        """For each run, what the best fixed coefficient has forgotten when it reaches the same new-task loss."""
        found = []
        for seed, result in self.results.items():
            there = [forgetting(run, new_loss(result)) for run in self.fixed.get(seed, ())]
            found.append(min((value for value in there if not isnan(value)), default=nan))
        return found

    def cells(self) -> list[str]:
        """Its line of the table."""
        told, measured = zip(*self.exchanges, strict=True) if self.exchanges else ((), ())
        return [
            self.text,
            scientific(self.rate),
            f"{self.budget:g}",
            str(len(self.results)),
            cell(self.of_each(self.end), ".2f"),
            cell(self.of_each(self.peak), ".2f"),
            cell(self.of_each(new_loss), ".2f"),
            cell(self.of_each(forgotten)),
            cell(self.against_fixed) if self.fixed else "",
            *(cell(values, ".1f") if values else "" for values in (told, measured)),
        ]


def new_loss(result: Mapping[str, Any]) -> float:
    """The last new-task loss of a run."""
    return float(result["points"][-1]["new_loss"])


def price(result: Mapping[str, Any]) -> float:
    """The last price of a run."""
    return float(result["budget"]["replay/price"][-1])


def forgotten(result: dict[str, Any]) -> float:
    """The rise of the prior loss in a run."""
    return forgetting(trajectory(result))


def budget(lab: Lab) -> Report:
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

    def by_seed(*key: Any) -> dict[int, dict[str, Any]]:
        return {seed: results[(*key, seed)] for seed in lab.seeds if (*key, seed) in results}

    def trajectories(name: str) -> dict[int, list[Trajectory]]:
        found: dict[int, list[Trajectory]] = {}
        for coefficient in COEFFICIENTS:
            for seed, result in by_seed(name, coefficient).items():
                found.setdefault(seed, []).append(trajectory(result))
        return found

    held = [
        Held(
            name,
            rate,
            allowed,
            by_seed(name, rate, allowed),
            by_seed(name, rate, MORE * allowed) if rate == middle else {},
            trajectories(name) if rate == middle else {},
        )
        for name in texts
        for rate in scale.budget_rates
        for allowed in budgets
    ]
    held = [each for each in held if each.results]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, len(texts), sharex=True, sharey="row", squeeze=False)
        for column, name in enumerate(texts):
            above, below = axes[:, column]
            for each in held:
                if each.text != name:
                    continue
                look = Look.of(budgets.index(each.budget))
                dashes = [(), (4.0, 2.0), (1.0, 1.5)][scale.budget_rates.index(each.rate) % 3]
                line = {**look.line(), "dashes": dashes, "linewidth": 1.0}
                logged = next(iter(each.results.values()))["budget"]
                above.plot([drift / each.budget for drift in logged["replay/drift"]], **line)
                below.plot(logged["replay/coefficient"], label=f"{each.budget:g} at {scientific(each.rate)}", **line)
            above.axhline(1.0, color="black", linewidth=0.8, alpha=0.5)
            above.set_title(name)
            below.set(xlabel="optimizer steps", yscale="log")
            plain_numbers(below.yaxis)
        axes[0, 0].set_ylabel("drift ÷ budget")
        axes[1, 0].set_ylabel("coefficient")
        figure.legend(
            *axes[1, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, title="budget"
        )

    ends_found = [end for each in held for end in each.of_each(each.end)]
    return Report(
        claim="A budget of forgetting is held",
        experiment=f"Budgets {', '.join(f'{each:g}' for each in budgets)} at learning rates "
        f"{', '.join(map(scientific, scale.budget_rates))}, {scale.budget_steps} steps, {count(lab.seeds, 'seed')}",
        paper="",
        ours=f"drift ÷ budget over the last quarter: {cell(ends_found, '.2f')}; "
        f"highest after step {SETTLED}: {max(peak for each in held for peak in each.of_each(each.peak)):.2f}",
        details=table(
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
            [each.cells() for each in held],
        ),
        rows=[
            {
                "text": each.text,
                "learning_rate": each.rate,
                "budget": each.budget,
                "seed": seed,
                "drift_last_quarter": each.end(result) * each.budget,
                "highest_drift": each.peak(result) * each.budget,
                "new_loss": new_loss(result),
                "forgetting": forgotten(result),
                "best_fixed_forgetting": best,
                "price": price(result),
                "new_loss_with_larger_budget": new_loss(each.larger[seed]) if seed in each.larger else "",
            }
            for each in held
            for (seed, result), best in zip(each.results.items(), each.against_fixed, strict=True)
        ],
        draw=draw,
        size=(9.5, 5.5),
    )


if __name__ == "__main__":
    main({"budget": budget}, __doc__)
