"""How well forgetting on the model's own samples stands for forgetting on real prior text.

    python examples/paper/self_forgetting.py --model DIR --prior known.txt --new new.txt --other another.txt

Finetunes the model in many ways, watched by ``ForgettingMonitor(self_rows=64)`` beside held-out text, and correlates
``forgetting/self`` with the rise of the loss on prior text: at the ends of the runs, and at all measurements.
"""

from dataclasses import fields
from itertools import chain
from typing import ClassVar

import torch
from arms import ARMS, PLAIN
from experiments import Lab, Report, count, main, plain_numbers, table
from matplotlib.figure import Figure
from runs import Finetuning, Trajectory
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from lightning_replay.report.plots import Look

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


def self_forgetting(lab: Lab) -> Report:
    """Correlate what the monitor sees without prior data with what real prior text shows."""
    runs = watched(lab)

    def points(group: str, only_ends: bool) -> list[tuple[float, float]]:
        chosen = [run for name, _, _, run in runs if group in ("all runs", name)]
        pairs = [
            [(point.self_kl, point.prior_loss - run[0].prior_loss) for point in (run[-1:] if only_ends else run[1:])]
            for run in chosen
        ]
        return list(chain.from_iterable(pairs))

    def correlations(group: str, only_ends: bool) -> tuple[str, str, str]:
        pairs = torch.tensor(points(group, only_ends), dtype=torch.float64)
        x, y = pairs.T
        return str(len(pairs)), f"{float(pearson_corrcoef(x, y)):.3f}", f"{float(spearman_corrcoef(x, y)):.3f}"

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for index, group in enumerate(NAMES):
            x, y = zip(*points(group, True), strict=True)
            axis.scatter(x, y, s=14, color=Look.of(index).color, label=group, alpha=0.8)
        for scale in (axis.set_xscale, axis.set_yscale):
            scale("symlog", linthresh=0.01)
        for numbers in (axis.xaxis, axis.yaxis):
            plain_numbers(numbers)
        axis.set(
            title=f"Ends of {len(runs)} runs: Spearman {correlations('all runs', True)[2]}",
            xlabel="forgetting/self, nats a token",
            ylabel="forgetting on prior text, nats a token",
        )
        axis.legend(frameon=False)

    errors = [run[-1].self_error / run[-1].self_kl for *_, run in runs]
    _, pearson, spearman = correlations("all runs", True)
    return Report(
        claim="Forgetting can be measured without prior data",
        experiment=f"The ends of {len(runs)} finetunings, {count(lab.seeds, 'seed')}: `forgetting/self` on "
        f"{Watched.self_rows} samples of the model's own against the rise of the loss on held-out prior text",
        paper="not tried",
        ours=f"Pearson {pearson}, Spearman {spearman}; standard error of `forgetting/self` "
        f"{sorted(errors)[len(errors) // 2]:.1%} of it (median)",
        details=table(
            ["measurements", "runs", "number", "Pearson", "Spearman"],
            [
                ["ends" if only_ends else "all", group, *correlations(group, only_ends)]
                for only_ends in (True, False)
                for group in ("all runs", *NAMES)
            ],
        ),
        rows=[
            {"run": name, "seed": seed, "forgetting": point.prior_loss - run[0].prior_loss, **vars(point)}
            for _, name, seed, run in runs
            for point in run
        ],
        draw=draw,
        size=(6.0, 4.2),
    )


def watched(lab: Lab) -> list[tuple[str, str, int, Trajectory]]:
    """Group, name, seed and trajectory of every run."""
    chosen = [
        (group, name, seed, ARMS[name].run(lab, seed)) for seed in lab.seeds for group in NAMES for name in NAMES[group]
    ]
    chosen += [
        ("without replay", f"learning rate {rate:g}", seed, lab.finetuning(seed, learning_rate=rate))
        for seed in lab.seeds
        for rate in RATES
    ]
    runs = [Watched(**{each.name: getattr(run, each.name) for each in fields(run)}) for *_, run in chosen]
    measured = lab.trajectories(runs)
    return [(group, name, seed, run) for (group, name, seed, _), run in zip(chosen, measured, strict=True)]


if __name__ == "__main__":
    main({"self_forgetting": self_forgetting}, __doc__)
