"""How well a budget of forgetting is held, and what its price predicts: not a claim, but a check.

    python examples/paper/budget.py --model DIR --prior known.txt --new new.txt --other another.txt

`run_all.py` leaves it out. Takes half an hour on two cores for a model of 650,000 parameters, by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean, mean
from typing import Any

from experiments import Lab, Report, cell, count, main, plain_numbers, table
from learning_rate import scientific
from matplotlib.figure import Figure
from runs import Point, forgetting

from lightning_replay import ForgettingBudget
from lightning_replay.report.plots import Look

SETTLED = 50
"""Steps after which the drift is not to exceed its budget by far."""


@dataclass(frozen=True)
class Held:
    """Runs with one budget at one learning rate, a run for each seed."""

    budget: float
    rate: float
    results: Sequence[dict[str, Any]]

    @property
    def ends(self) -> list[float]:
        """Of each run, the mean drift over the last quarter, relative to the budget."""
        drifts = [result["budget"]["replay/drift"] for result in self.results]
        return [mean(drift[len(drift) * 3 // 4 :]) / self.budget for drift in drifts]

    @property
    def peaks(self) -> list[float]:
        """Of each run, the highest smoothed drift once it has settled, relative to the budget."""
        return [max(result["budget"]["replay/drift"][SETTLED:]) / self.budget for result in self.results]

    @property
    def prices(self) -> list[float]:
        """Of each run, the last price."""
        return [result["budget"]["replay/price"][-1] for result in self.results]

    @property
    def losses(self) -> list[float]:
        """Of each run, the last new-task loss."""
        return [result["points"][-1]["new_loss"] for result in self.results]

    @property
    def forgotten(self) -> list[float]:
        """Of each run, the rise of the prior loss."""
        return [forgetting([Point(**point) for point in result["points"]]) for result in self.results]


def budget(lab: Lab) -> Report:
    """Finetune with budgets at several learning rates."""
    scale = lab.scale
    pairs = [(rate, allowed) for rate in scale.budget_rates for allowed in sorted(scale.budgets)]
    runs = [
        lab.finetuning(
            seed,
            learning_rate=rate,
            steps=scale.budget_steps,
            replay={"loss": "kl", "coefficient": ForgettingBudget(allowed)},
        )
        for rate, allowed in pairs
        for seed in lab.seeds
    ]
    results, seeds = lab.results(runs), len(lab.seeds)
    held = [
        Held(allowed, rate, results[number * seeds : (number + 1) * seeds])
        for number, (rate, allowed) in enumerate(pairs)
    ]
    bought = {
        number: exchange(*held[number : number + 2]) for number in range(len(held)) if (number + 1) % len(scale.budgets)
    }

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 1, sharex=True)
        for index, each in enumerate(held):
            look, logged = Look.of(index), each.results[0]["budget"]
            label = f"{each.budget:g} at {scientific(each.rate)}"
            axes[0].plot([drift / each.budget for drift in logged["replay/drift"]], label=label, **look.line())
            axes[1].plot(logged["replay/coefficient"], **look.line())
        axes[0].axhline(1.0, color="black", linewidth=0.8, alpha=0.5)
        axes[0].set(title="A budget of forgetting, held", ylabel="drift ÷ budget")
        axes[0].legend(frameon=False, fontsize=6, ncols=3)
        axes[1].set(xlabel="optimizer steps", ylabel="coefficient", yscale="log")
        plain_numbers(axes[1].yaxis)

    return Report(
        claim="A budget of forgetting is held",
        experiment=f"Budgets {', '.join(f'{each:g}' for each in sorted(scale.budgets))} at learning rates "
        f"{', '.join(map(scientific, scale.budget_rates))}, {scale.budget_steps} steps, {count(lab.seeds, 'seed')}",
        paper="",
        ours=f"drift ÷ budget over the last quarter: {cell([end for each in held for end in each.ends], '.2f')}; "
        f"highest after step {SETTLED}: {max(peak for each in held for peak in each.peaks):.2f}",
        details=table(
            [
                "learning rate",
                "budget",
                "drift ÷ budget, last quarter",
                f"highest after step {SETTLED}",
                "new-task loss",
                "forgetting",
                "price",
                "mean price up to the next budget",
                "nats of loss a nat of drift, measured",
            ],
            [
                [
                    scientific(each.rate),
                    f"{each.budget:g}",
                    cell(each.ends, ".2f"),
                    cell(each.peaks, ".2f"),
                    cell(each.losses, ".2f"),
                    cell(each.forgotten),
                    cell(each.prices, ".1f"),
                    *(cell(values, ".1f") if values else "" for values in bought.get(number, ([], []))),
                ]
                for number, each in enumerate(held)
            ],
        ),
        rows=[
            {"learning_rate": each.rate, "budget": each.budget, "seed": seed, "step": step + 1}
            | {key: values[step] for key, values in result["budget"].items()}
            for each in held
            for seed, result in zip(lab.seeds, each.results, strict=True)
            for step in range(len(result["budget"]["replay/drift"]))
        ],
        draw=draw,
        size=(7.5, 5.5),
    )


def exchange(one: Held, other: Held) -> tuple[list[float], list[float]]:
    """Nats of new-task loss that a nat of drift buys between two budgets, by the price and as measured, a seed each."""
    told = [geometric_mean(prices) for prices in zip(one.prices, other.prices, strict=True)]
    measured = [
        (ours - theirs) / (other.budget - one.budget) for ours, theirs in zip(one.losses, other.losses, strict=True)
    ]
    return told, measured


if __name__ == "__main__":
    main({"budget": budget}, __doc__)
