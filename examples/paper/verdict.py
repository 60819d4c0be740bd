"""Whether the verdict at the end of a run with a budget is right, on models of several sizes.

    python examples/paper/verdict.py --model DIR --prior known.txt --new new.txt --other another.txt

The models are those of `capacity.py`, pretrained to one prior loss. Each is finetuned with each budget, then again in
twice the steps, and with a larger budget: what these runs gain says what would have helped. `run_all.py` leaves it out.
Takes half an hour on two cores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from budget import MORE, new_loss, price
from capacity import Start, narrow, wide
from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, count, plain_numbers
from runs import Finetuning

from lightning_replay import ForgettingBudget
from lightning_replay.callbacks.budget import NEAR
from lightning_replay.callbacks.verdict import LITTLE, Course, Verdict, verdict
from lightning_replay.report.plots import Look
from lightning_replay.utilities.tables import markdown

CLEAR = 1.5
"""By which factor a gain has to be above or below that for a case to be clear-cut."""
SPACING = 10
"""Steps between the points of the picture's curves."""


@dataclass(frozen=True)
class Case:
    """A run with a budget, and what others gained: a line of the CSV file.

    Attributes:
        width: Of the model.
        parameters: Of the model.
        seed: Of its pretraining and of the run.
        prior_level: The prior loss to which all models were pretrained.
        budget: In nats a byte.
        steps: Of the run.
        new_loss_before: The new-task loss before the run.
        new_loss: The last one.
        price: The last one.
        gain_in_twice_the_steps: In nats of new-task loss.
        gain_with_larger_budget: The same, with a budget ``MORE`` times as large.
        gain_with_larger_model: What the next larger model gained with the same budget; None for the largest.
        verdict: What would help, as the run said at its end.
        sentence: In words.
    """

    width: int
    parameters: int
    seed: int
    prior_level: float
    budget: float
    steps: int
    new_loss_before: float
    new_loss: float
    price: float
    gain_in_twice_the_steps: float
    gain_with_larger_budget: float
    gain_with_larger_model: float | None
    verdict: str
    sentence: str

    @property
    def counts_from(self) -> float:
        """What counts as a gain."""
        return LITTLE * (self.new_loss_before - self.new_loss)

    @property
    def would_help(self) -> str:
        """What would have helped."""
        steps, room = (gain > self.counts_from for gain in (self.gain_in_twice_the_steps, self.gain_with_larger_budget))
        return "steps" if steps else "room" if room else "nothing"

    @property
    def is_clear(self) -> bool:
        """Whether no gain that decides is near to what counts."""
        deciding = [self.gain_in_twice_the_steps, self.gain_with_larger_budget]
        if self.would_help == "steps":
            del deciding[1]
        return not any(self.counts_from / CLEAR < gain < self.counts_from * CLEAR for gain in deciding)

    @property
    def is_right(self) -> bool:
        """Whether the verdict says what would have helped, or leaves open a case that is not clear-cut."""
        return self.verdict == self.would_help or (self.verdict == "unknown" and not self.is_clear)

    def cells(self) -> list[str]:
        """Its line of the table."""
        gains = (self.gain_in_twice_the_steps, self.gain_with_larger_budget, self.gain_with_larger_model)
        return [
            f"{self.parameters:,}",
            f"{self.budget:g}",
            f"{self.new_loss:.2f}",
            f"{self.price:.1f}",
            *("" if gain is None else f"{gain:+.3f}".replace("-", "−") for gain in gains),
            f"{self.counts_from:.3f}",
            self.would_help,
            "yes" if self.is_clear else "no",
            self.verdict,
        ]


@dataclass(frozen=True)
class Price:
    """The price after a step of a run with twice the steps, for the picture.

    Attributes:
        parameters: Of the model.
        budget: In nats a byte.
        seed: Of the run.
        step: Optimizer steps so far.
        price: Nats of new-task loss a nat of drift.
    """

    parameters: int
    budget: float
    seed: int
    step: int
    price: float


def verdict_at_end(logged: Mapping[str, Sequence[float]], budget: float) -> Verdict:
    """What a run says at its end, by what its budget logged."""
    losses, drift = Course(), logged["replay/drift"][-1]
    for loss in logged["train/loss"]:
        losses.add(loss)
    return verdict(losses, drift >= (1 - NEAR) * budget, (MORE - 1) * budget * logged["replay/price"][-1])


def measure(lab: Lab) -> dict[str, Sequence[Case | Price]]:
    """Pretrain and finetune."""
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
            told = verdict_at_end(here["budget"], budget)
            cases.append(
                Case(
                    width=start.width,
                    parameters=start.parameters,
                    seed=start.seed,
                    prior_level=prior_level,
                    budget=budget,
                    steps=steps,
                    new_loss_before=here["points"][0]["new_loss"],
                    new_loss=new_loss(here),
                    price=price(here),
                    gain_in_twice_the_steps=new_loss(here) - new_loss(found[start, budget, "steps"]),
                    gain_with_larger_budget=new_loss(here) - new_loss(found[start, budget, "more"]),
                    gain_with_larger_model=None
                    if larger is None
                    else new_loss(here) - new_loss(found[larger, budget, ""]),
                    verdict=told.helps,
                    sentence=told.sentence,
                )
            )
    drawn = lab.scale.verdict_budgets[0]
    prices = [
        Price(start.parameters, drawn, start.seed, step, float(f"{value:.4g}"))
        for start in starts
        if start.seed == lab.seeds[0]
        for step, value in enumerate(found[start, drawn, "steps"]["budget"]["replay/price"], 1)
        if step % SPACING == 1
    ]
    return {"verdict": cases, "verdict_prices": prices}


def report(cases: Sequence[Case], prices: Sequence[Price]) -> Report:
    """Compare the verdicts with what would have helped."""
    clear, unclear = ([case for case in cases if case.is_clear == wanted] for wanted in (True, False))
    widths, budgets = (sorted({getattr(case, name) for case in cases}) for name in ("width", "budget"))

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for index, parameters in enumerate(dict.fromkeys(each.parameters for each in prices)):
            curve = [(each.step, each.price) for each in prices if each.parameters == parameters]
            axis.plot(*zip(*curve, strict=True), label=f"{parameters:,} parameters", **Look.of(index).line())
        axis.set(
            title=f"Price at a budget of {prices[0].budget:g} nats a byte",
            xlabel="optimizer steps",
            ylabel="nats of new-task loss a nat of drift",
            yscale="log",
        )
        plain_numbers(axis.yaxis)
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend(frameon=False)

    return Report(
        claim="A run with a budget says what would help",
        experiment=f"Llamas {', '.join(map(str, widths))} wide, reading bytes, pretrained to a prior loss of "
        f"{cases[0].prior_level:.2f}, finetuned for {cases[0].steps} steps with budgets of "
        f"{', '.join(f'{each:g}' for each in budgets)}, {count((case.seed for case in cases), 'seed')}",
        paper="",
        ours=f"right in {sum(case.is_right for case in clear)} of {len(clear)} clear-cut cases; of the other "
        f"{len(unclear)}, {sum(case.verdict == 'unknown' for case in unclear)} left open",
        details=markdown(
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
            [case.cells() for case in cases],
        ),
        draw=draw,
    )


SCRIPT = Script({"verdict": Case, "verdict_prices": Price}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
