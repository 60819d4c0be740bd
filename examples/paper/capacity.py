"""Claim: capacity bounds forgetting, and a model that was pretrained longer forgets more.

    python examples/paper/capacity.py --model DIR --prior known.txt --new new.txt --other another.txt

Small models are pretrained on the prior text, byte by byte, so the given model is not used. The narrowest is pretrained
to a number of tokens for each of its parameters, the others to the prior loss that it has then. All are finetuned to
one new-task loss over a sweep of coefficients; the lowest prior loss over the coefficients counts. The
narrowest is also finetuned without replay from earlier steps of its pretraining.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isnan
from statistics import mean
from typing import Any

from arms import loss_after
from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, cell, plain_numbers
from runs import Finetuning, at_new_loss

from lightning_replay.report.plots import Look
from lightning_replay.utilities.tables import markdown

COEFFICIENTS = (0.0, 0.3, 1.0, 3.0, 10.0)
"""Of the KL on the model's own samples; 0 is no replay."""
LEVEL_AT = 0.15
"""The share of its steps after which the narrowest model, without replay, is at the new-task loss for all."""
PER_DECADE = 2
"""Lengths of pretraining looked at in each power of ten."""
FORGETTING = "forgetting, nats a byte"


@dataclass(frozen=True)
class Start:
    """A pretrained model to finetune."""

    model: str
    width: int
    seed: int
    parameters: int
    steps: int
    tokens_per_parameter: float


@dataclass(frozen=True)
class Finetuned:
    """A pretrained model finetuned with a coefficient to the new-task loss: a line of the CSV file.

    Attributes:
        width: Of the model.
        parameters: Of the model.
        tokens_per_parameter: Of its pretraining.
        seed: Of its pretraining and of its finetuning.
        coefficient: Of the KL; 0 for no replay.
        prior_level: The prior loss to which the narrowest model was pretrained.
        new_level: The new-task loss.
        steps: Optimizer steps of the finetuning.
        new_loss_before: On held-out new text, before it.
        prior_loss_before: On held-out prior text, before it.
        prior_loss: The same when the run passed the new-task loss; NaN if it did not.
    """

    width: int
    parameters: int
    tokens_per_parameter: float
    seed: int
    coefficient: float
    prior_level: float
    new_level: float
    steps: int
    new_loss_before: float
    prior_loss_before: float
    prior_loss: float

    @property
    def forgetting(self) -> float:
        """The rise of the prior loss."""
        return self.prior_loss - self.prior_loss_before


def narrow(lab: Lab) -> tuple[list[list[Start]], float]:
    """The narrowest model at each length of its pretraining, for each seed, and the prior loss at the end."""
    width, most = lab.scale.widths[0], lab.scale.tokens_per_parameter
    shares = [10 ** (-place / PER_DECADE) for place in range(lab.scale.decades * PER_DECADE, -1, -1)]
    one = lab.pretraining(width, 0, 1, 1)
    parameters = one.parameters
    keep = tuple(max(1, round(share * most * parameters / one.tokens_per_step)) for share in shares)
    runs = [lab.pretraining(width, seed, keep[-1], max(1, keep[-1] // 20), keep=keep) for seed in lab.seeds]
    results = lab.results(runs)
    starts = [
        [
            Start(result["kept"][str(step)], width, run.seed, parameters, step, step * run.tokens_per_step / parameters)
            for step in keep
        ]
        for run, result in zip(runs, results, strict=True)
    ]
    return starts, mean(result["points"][-1]["prior_loss"] for result in results)


def wide(lab: Lab, prior_level: float, steps: int) -> list[Start]:
    """The other models, each pretrained to a prior loss."""
    runs = [
        lab.pretraining(width, seed, steps, max(1, min(10, steps // 10)), until=prior_level)
        for width in lab.scale.widths[1:]
        for seed in lab.seeds
    ]
    return [
        Start(
            list(result["kept"].values())[-1],
            run.width,
            run.seed,
            run.parameters,
            (steps := result["points"][-1]["step"]),
            steps * run.tokens_per_step / run.parameters,
        )
        for run, result in zip(runs, lab.results(runs), strict=True)
    ]


def finetuning(lab: Lab, start: Start, coefficient: float, until: float | None) -> Finetuning:
    """The run of a model with a coefficient."""
    replay = {"loss": "kl", "coefficient": coefficient} if coefficient else None
    steps = lab.scale.capacity_steps
    return lab.finetuning(
        start.seed, model=start.model, steps=steps, every=max(1, steps // 50), until=until, replay=replay
    )


def lowest(runs: Sequence[Finetuned]) -> Finetuned:
    """The run with the lowest prior loss among those that reach the new-task loss; any if none does."""
    return min(runs, key=lambda run: inf if isnan(run.prior_loss) else run.prior_loss)


def measure(lab: Lab) -> dict[str, list[Finetuned]]:
    """Pretrain and finetune."""
    lengths, prior_level = narrow(lab)
    longest = [starts[-1] for starts in lengths]
    starts = longest + wide(lab, prior_level, longest[0].steps)
    aims = lab.trajectories([finetuning(lab, start, 0.0, None) for start in longest])
    level = mean(loss_after(run, LEVEL_AT * lab.scale.capacity_steps) for run in aims)

    pairs = [(start, coefficient) for start in starts for coefficient in COEFFICIENTS]
    pairs += [(start, 0.0) for seeds in lengths for start in seeds[:-1]]
    runs = lab.trajectories([finetuning(lab, start, coefficient, level) for start, coefficient in pairs])
    found = [
        Finetuned(
            start.width,
            start.parameters,
            round(start.tokens_per_parameter, 2),
            start.seed,
            coefficient,
            prior_level,
            level,
            run[-1].step,
            run[0].new_loss,
            run[0].prior_loss,
            at_new_loss(run, level, "prior_loss"),
        )
        for (start, coefficient), run in zip(pairs, runs, strict=True)
    ]
    return {"capacity": found}


def report(runs: Sequence[Finetuned]) -> Report:
    """Compare the widths at one prior loss, and the lengths of pretraining of the narrowest."""
    widths, seeds = (sorted({getattr(run, name) for run in runs}) for name in ("width", "seed"))
    most = max(run.tokens_per_parameter for run in runs if run.width == widths[0])
    prior_level, level = runs[0].prior_level, runs[0].new_level
    swept = [run for run in runs if run.width != widths[0] or run.tokens_per_parameter == most]
    best = {
        width: [lowest([run for run in swept if (run.width, run.seed) == (width, seed)]) for seed in seeds]
        for width in widths
    }
    without = {width: [run for run in swept if run.width == width and not run.coefficient] for width in widths}
    by_length = [run for run in runs if run.width == widths[0] and not run.coefficient]
    tokens = sorted({run.tokens_per_parameter for run in by_length})
    at_length = {
        number: [run.forgetting for run in by_length if run.tokens_per_parameter == number] for number in tokens
    }

    def draw(figure: Figure) -> None:
        by_size, by_tokens = figure.subplots(1, 2)
        sizes = [group[0].parameters for group in best.values()]
        for index, (name, groups) in enumerate({"no replay": without, "best coefficient": best}.items()):
            band(by_size, sizes, [[run.forgetting for run in group] for group in groups.values()], index, name)
        band(by_tokens, tokens, list(at_length.values()), 0, "no replay")
        by_size.set_xticks(sizes, [f"{size:,}" for size in sizes])
        by_size.set(title=f"Pretrained to a prior loss of {prior_level:.2f}", xlabel="parameters", ylabel=FORGETTING)
        by_tokens.set(title=f"{sizes[0]:,} parameters", xlabel="pretraining tokens per parameter", ylabel=FORGETTING)

    return Report(
        claim="Capacity bounds forgetting",
        experiment=f"Llamas {', '.join(map(str, widths))} wide, reading bytes, pretrained to a prior loss of "
        f"{prior_level:.2f}, finetuned to a new-task loss of {level:.2f} with KL × 0 to 10: rise of the lowest prior "
        "loss; and the narrowest without replay after longer pretraining",
        paper="rise of 0.26 at 6M parameters, 0.005 at 46M; −0.004 at 10 tokens per parameter, 0.181 at 10,000",
        ours="; ".join(
            f"{group[0].parameters:,} parameters {cell([run.forgetting for run in group])}" for group in best.values()
        )
        + "; "
        + ", ".join(
            f"{cell(at_length[number])} at {number:,.0f} tokens per parameter" for number in (tokens[0], tokens[-1])
        ),
        details=markdown(
            [
                "width",
                "parameters",
                "tokens per parameter",
                "best coefficient",
                "prior loss before",
                "lowest after",
                "rise",
            ],
            [
                [
                    str(width),
                    f"{group[0].parameters:,}",
                    cell([run.tokens_per_parameter for run in group], ".0f"),
                    ", ".join(f"{run.coefficient:g}" for run in group),
                    cell([run.prior_loss_before for run in group], ".3f"),
                    cell([run.prior_loss for run in group], ".3f"),
                    cell([run.forgetting for run in group]),
                ]
                for width, group in best.items()
            ],
        )
        + "\n\n"
        + markdown(
            ["tokens per parameter", *(f"{number:,.0f}" for number in tokens)],
            [["forgetting without replay", *(cell(values) for values in at_length.values())]],
        ),
        draw=draw,
        size=(7.5, 3.4),
    )


def band(axis: Any, x: Sequence[float], groups: Sequence[Sequence[float]], index: int, name: str) -> None:
    """Draw means with the range of the seeds, for those that reached the level."""
    known = [
        (place, reached) for place, group in zip(x, groups, strict=True) if (reached := [v for v in group if v == v])
    ]
    places = [place for place, _ in known]
    look = Look.of(index)
    axis.fill_between(places, [min(v) for _, v in known], [max(v) for _, v in known], color=look.color, alpha=0.15)
    axis.plot(places, [mean(v) for _, v in known], marker="o", **look.line())
    axis.annotate(
        name, (places[-1], mean(known[-1][1])), (0, 7), textcoords="offset points", ha="right", color=look.color
    )
    axis.set_xscale("log")
    plain_numbers(axis.xaxis)
    axis.margins(y=0.15)


SCRIPT = Script({"capacity": Finetuned}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
