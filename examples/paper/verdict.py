"""Whether the verdict at the end of a run with a budget is right, on models of several sizes.

    python examples/paper/verdict.py --model DIR --prior known.txt --new new.txt --other another.txt

The models are those of `capacity.py`, pretrained to one prior loss. Each is finetuned with each budget, then again in
twice the steps, and with a larger budget: what these runs gain says what would have helped. `run_all.py` leaves it out.
Takes half an hour on two cores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from budget import MORE, new_loss, price
from capacity import Start, narrow, wide
from experiments import Lab, Report, count, main, plain_numbers, table
from matplotlib.figure import Figure
from runs import Finetuning

from lightning_replay import ForgettingBudget
from lightning_replay.callbacks.budget import NEAR
from lightning_replay.callbacks.verdict import LITTLE, Course, Verdict
from lightning_replay.callbacks.verdict import verdict as verdict_of
from lightning_replay.report.plots import Look

CLEAR = 1.5
"""By which factor a gain has to be above or below that for a case to be clear-cut."""


@dataclass(frozen=True)
class Case:
    """A run with a budget, and what others gained.

    Attributes:
        start: The model.
        budget: In nats a byte.
        result: Of the run.
        steps: What twice the steps gained, in nats of new-task loss.
        more: What a larger budget gained.
        larger: What the next larger model gained with the same budget; None for the largest.
    """

    start: Start
    budget: float
    result: Mapping[str, Any]
    steps: float
    more: float
    larger: float | None

    @property
    def gains(self) -> tuple[float, float, float | None]:
        """Of twice the steps, a larger budget and a larger model."""
        return self.steps, self.more, self.larger

    @property
    def least(self) -> float:
        """What counts as a gain."""
        return LITTLE * (float(self.result["points"][0]["new_loss"]) - new_loss(self.result))

    @property
    def verdict(self) -> Verdict:
        """At the end of the run."""
        losses, drift = Course(), self.result["budget"]["replay/drift"][-1]
        for loss in self.result["budget"]["train/loss"]:
            losses.add(loss)
        return verdict_of(losses, drift >= (1 - NEAR) * self.budget, (MORE - 1) * self.budget * price(self.result))

    @property
    def truth(self) -> str:
        """What would have helped."""
        return "steps" if self.steps > self.least else "room" if self.more > self.least else "nothing"

    @property
    def is_clear(self) -> bool:
        """Whether no gain that decides is near to what counts."""
        deciding = [self.steps] if self.truth == "steps" else [self.steps, self.more]
        return not any(self.least / CLEAR < gain < self.least * CLEAR for gain in deciding)

    @property
    def is_right(self) -> bool:
        """Whether the verdict says what would have helped, or leaves open a case that is not clear-cut."""
        return self.verdict.helps == self.truth or (self.verdict.helps == "unknown" and not self.is_clear)

    def line(self) -> dict[str, Any]:
        """For the CSV file."""
        return {
            "width": self.start.width,
            "parameters": self.start.parameters,
            "seed": self.start.seed,
            "budget": self.budget,
            "new_loss_before": self.result["points"][0]["new_loss"],
            "new_loss": new_loss(self.result),
            "price": price(self.result),
            "gain_in_twice_the_steps": self.steps,
            "gain_with_larger_budget": self.more,
            "gain_with_larger_model": self.larger,
            "counts_from": self.least,
            "would_help": self.truth,
            "clear_cut": self.is_clear,
            "verdict": self.verdict.helps,
            "sentence": self.verdict.sentence,
        }


def verdict(lab: Lab) -> Report:
    """Pretrain, finetune and compare."""
    lengths, prior_level = narrow(lab)
    longest = [starts[-1] for starts in lengths]
    starts = longest + wide(lab, prior_level, longest[0].steps)
    steps = lab.scale.verdict_steps

    def run(start: Start, budget: float, steps: int) -> Finetuning:
        replay = {"loss": "kl", "coefficient": ForgettingBudget(budget)}
        return lab.finetuning(start.seed, model=start.model, steps=steps, every=steps, replay=replay)

    found = lab.done(
        {
            (start, budget, kind): run(start, budget * (MORE if kind == "more" else 1), steps * (1 + (kind == "steps")))
            for start in starts
            for budget in lab.scale.verdict_budgets
            for kind in ("", "steps", "more")
        }
    )
    cases = []
    for start in starts:
        larger = next((other for other in starts if other.width > start.width and other.seed == start.seed), None)
        for budget in lab.scale.verdict_budgets:
            here = found[start, budget, ""]
            in_steps, with_more = (new_loss(here) - new_loss(found[start, budget, kind]) for kind in ("steps", "more"))
            with_larger = None if larger is None else new_loss(here) - new_loss(found[larger, budget, ""])
            cases.append(Case(start, budget, here, in_steps, with_more, with_larger))
    clear = [case for case in cases if case.is_clear]

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for index, start in enumerate(longest[:1] + [start for start in starts if start.seed == lab.seeds[0]][1:]):
            prices = found[start, lab.scale.verdict_budgets[0], "steps"]["budget"]["replay/price"]
            axis.plot(prices, label=f"{start.parameters:,} parameters", **Look.of(index).line())
        axis.set(
            title=f"Price at a budget of {lab.scale.verdict_budgets[0]:g} nats a byte",
            xlabel="optimizer steps",
            ylabel="nats of new-task loss a nat of drift",
            yscale="log",
        )
        plain_numbers(axis.yaxis)
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend(frameon=False)

    right = sum(case.is_right for case in clear)
    return Report(
        claim="A run with a budget says what would help",
        experiment=f"Llamas {', '.join(map(str, lab.scale.widths))} wide, reading bytes, pretrained to a prior loss of "
        f"{prior_level:.2f}, finetuned for {steps} steps with budgets of "
        f"{', '.join(f'{each:g}' for each in lab.scale.verdict_budgets)}, {count(lab.seeds, 'seed')}",
        paper="",
        ours=f"right in {right} of {len(clear)} clear-cut cases; of the other {len(cases) - len(clear)}, "
        f"{sum(case.verdict.helps == 'unknown' for case in cases if not case.is_clear)} left open",
        details=table(
            [
                "parameters",
                "budget",
                "new-task loss",
                "price",
                "gain in twice the steps",
                f"with {MORE:g} × the budget",
                "with the next larger model",
                "counts from",
                "would help",
                "clear-cut",
                "verdict",
            ],
            [
                [
                    f"{case.start.parameters:,}",
                    f"{case.budget:g}",
                    f"{new_loss(case.result):.2f}",
                    f"{price(case.result):.1f}",
                    *("" if gain is None else f"{gain:+.3f}".replace("-", "−") for gain in case.gains),
                    f"{case.least:.3f}",
                    case.truth,
                    "yes" if case.is_clear else "no",
                    case.verdict.helps,
                ]
                for case in cases
            ],
        ),
        rows=[case.line() for case in cases],
        draw=draw,
    )


if __name__ == "__main__":
    main({"verdict": verdict}, __doc__)
