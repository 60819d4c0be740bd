"""How well forgetting on the model's own samples stands for forgetting on real prior text.

    python examples/paper/self_forgetting.py --model DIR --prior known.txt --new new.txt --other another.txt

Finetunes the model in many ways, watched by ``ForgettingMonitor(self_rows=64)`` beside held-out text, and correlates
``forgetting/self`` with the rise of the loss on prior text: at the ends of the runs, and at all measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from arms import ARMS, PLAIN, SeedPoint
from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, count, plain_numbers
from runs import Finetuning
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from lightning_replay.report.plots import Look
from lightning_replay.utilities.tables import markdown

NAMES = {
    "without replay": (PLAIN, "learning rate ÷ 10", "LoRA, rank 16", "KL on new rows × 1", "KL on new rows × 0.1"),
    "with replay": (
        *(f"KL × {coefficient:g}" for coefficient in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
        *(f"next-token × {coefficient:g}" for coefficient in (0.1, 1.0, 10.0)),
        "KL × 10, real rows",
        "next-token × 1, real rows",
        "KL × 10, other text",
        "next-token × 1, other text",
        "next-token × 1, live rows",
    ),
}
RATES = (3e-3, 3e-4, 3e-5)
"""Learning rates without replay, beside those of the arms."""


class Watched(Finetuning):
    """A finetuning that is also watched on samples of the model's own."""

    self_rows: ClassVar[int] = 64


@dataclass(frozen=True, kw_only=True)
class WatchedPoint(SeedPoint):
    """A measured point of a run.

    Attributes:
        run: Its name.
        group: One of ``NAMES``.
        forgetting: The rise of the prior loss since the first measurement.
    """

    run: str
    group: str
    forgetting: float


def measure(lab: Lab) -> dict[str, list[WatchedPoint]]:
    """Finetune in all ways."""
    chosen = [
        (group, name, seed, ARMS[name].run(lab, seed)) for seed in lab.seeds for group in NAMES for name in NAMES[group]
    ]
    chosen += [
        ("without replay", f"learning rate {rate:g}", seed, lab.finetuning(seed, learning_rate=rate))
        for seed in lab.seeds
        for rate in RATES
    ]
    runs = [Watched(**{each.name: getattr(run, each.name) for each in fields(run)}) for *_, run in chosen]
    points = [
        WatchedPoint(run=name, group=group, forgetting=point.prior_loss - run[0].prior_loss, seed=seed, **vars(point))
        for (group, name, seed, _), run in zip(chosen, lab.trajectories(runs), strict=True)
        for point in run
    ]
    return {"self_forgetting": points}


def report(points: Sequence[WatchedPoint]) -> Report:
    """Correlate what the monitor sees without prior data with what real prior text shows."""
    ends = list({(point.run, point.seed): point for point in points}.values())

    def pairs(group: str, only_ends: bool) -> list[tuple[float, float]]:
        measured = ends if only_ends else [point for point in points if point.step]
        return [(point.self_kl, point.forgetting) for point in measured if group in ("all runs", point.group)]

    def correlations(group: str, only_ends: bool) -> tuple[str, str, str]:
        x, y = torch.tensor(pairs(group, only_ends), dtype=torch.float64).T
        return str(len(x)), f"{float(pearson_corrcoef(x, y)):.3f}", f"{float(spearman_corrcoef(x, y)):.3f}"

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for index, group in enumerate(NAMES):
            x, y = zip(*pairs(group, True), strict=True)
            axis.scatter(x, y, s=14, color=Look.of(index).color, label=group, alpha=0.8)
        for scale in (axis.set_xscale, axis.set_yscale):
            scale("symlog", linthresh=0.01)
        for numbers in (axis.xaxis, axis.yaxis):
            plain_numbers(numbers)
        axis.set(
            title=f"Ends of {len(ends)} runs: Spearman {correlations('all runs', True)[2]}",
            xlabel="forgetting/self, nats a token",
            ylabel="forgetting on prior text, nats a token",
        )
        axis.legend(frameon=False)

    errors = [end.self_error / end.self_kl for end in ends]
    _, pearson, spearman = correlations("all runs", True)
    return Report(
        claim="Forgetting can be measured without prior data",
        experiment=f"The ends of {len(ends)} finetunings, {count((end.seed for end in ends), 'seed')}: "
        f"`forgetting/self` on {Watched.self_rows} samples of the model's own against the rise of the loss on "
        "held-out prior text",
        paper="not tried",
        ours=f"Pearson {pearson}, Spearman {spearman}; standard error of `forgetting/self` "
        f"{sorted(errors)[len(errors) // 2]:.1%} of it (median)",
        details=markdown(
            ["measurements", "runs", "number", "Pearson", "Spearman"],
            [
                ["ends" if only_ends else "all", group, *correlations(group, only_ends)]
                for only_ends in (True, False)
                for group in ("all runs", *NAMES)
            ],
        ),
        draw=draw,
        size=(6.0, 4.2),
    )


SCRIPT = Script({"self_forgetting": WatchedPoint}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
