"""Claim of neighbouring work: the KL divergence from the first model predicts forgetting.

    python examples/paper/drift.py --model DIR --prior known.txt --new new.txt --other another.txt

Uses the last measurement of each run in which the other scripts finetune the model; runs in the output folder are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import coefficients
import methods
import other_text
import torch
from arms import ARMS, SeedPoint, trajectories
from experiments import Lab, main
from learning_rate import ways
from matplotlib.figure import Figure
from reports import Report, Script
from runs import Trajectory, forgetting
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from lightning_replay.report.plots import Look
from lightning_replay.utilities.tables import markdown

TEXTS = {"prior_kl": "prior text", "new_kl": "new text"}
GROUPS = {"all runs": (False, True), "without replay": (False,), "with replay": (True,)}


@dataclass(frozen=True, kw_only=True)
class End(SeedPoint):
    """What was measured last in a run.

    Attributes:
        run: Its name.
        replays: Whether it adds a replay loss.
        forgetting: The rise of the prior loss since the first measurement.
    """

    run: str
    replays: bool
    forgetting: float


def measure(lab: Lab) -> dict[str, list[End]]:
    """Finetune in all ways."""
    ends = [
        End(run=name, replays=uses_replay(name), forgetting=forgetting(run), seed=seed, **vars(run[-1]))
        for name, seed, run in finetunings(lab)
    ]
    return {"drift": ends}


def report(ends: Sequence[End]) -> Report:
    """Correlate the rise of the prior loss with the KL divergence on both texts."""

    def series(key: str, replays: tuple[bool, ...]) -> tuple[list[float], list[float]]:
        chosen = [end for end in ends if end.replays in replays]
        return [getattr(end, key) for end in chosen], [end.forgetting for end in chosen]

    def correlations(key: str, group: str) -> tuple[str, str]:
        x, y = (torch.tensor(values, dtype=torch.float64) for values in series(key, GROUPS[group]))
        return f"{float(pearson_corrcoef(x, y)):.3f}", f"{float(spearman_corrcoef(x, y)):.3f}"

    def draw(figure: Figure) -> None:
        for axis, (key, text) in zip(figure.subplots(1, 2, sharey=True), TEXTS.items(), strict=True):
            for index, group in enumerate(list(GROUPS)[1:]):
                axis.scatter(*series(key, GROUPS[group]), s=14, color=Look.of(index).color, label=group, alpha=0.8)
            pearson, spearman = correlations(key, "all runs")
            axis.set(
                title=f"On {text}: Pearson {pearson}, Spearman {spearman}",
                xlabel=f"KL divergence on {text}, nats a token",
            )
        figure.axes[0].set_ylabel("forgetting, nats a token")
        figure.axes[0].legend(frameon=False)

    (prior, prior_ranks), (new, new_ranks) = (correlations(key, "all runs") for key in TEXTS)
    return Report(
        claim="KL drift predicts forgetting",
        experiment=f"The ends of all {len(ends)} runs above that finetune the model: forgetting against the KL "
        "divergence from the first model",
        paper="the KL on the new task predicts forgetting (RL's Razor)",
        ours=f"KL on prior text: Pearson {prior}, Spearman {prior_ranks}; on new text: {new}, {new_ranks}; on new text "
        f"without replay: {', '.join(correlations('new_kl', 'without replay'))}",
        details=markdown(
            ["KL on", "runs", "number", "Pearson", "Spearman"],
            [
                [text, group, str(len(series(key, GROUPS[group])[0])), *correlations(key, group)]
                for key, text in TEXTS.items()
                for group in GROUPS
            ],
        ),
        draw=draw,
        size=(7.5, 3.6),
    )


def finetunings(lab: Lab) -> list[tuple[str, int, Trajectory]]:
    """Name, seed and trajectory of every run that finetunes the model."""
    scripts = (methods.NAMES, other_text.NAMES, coefficients.NAMES)
    arms = trajectories(lab, list(dict.fromkeys(name for names in scripts for name in names)))
    runs = [(name, seed, run) for name, each in arms.items() for seed, run in zip(lab.seeds, each, strict=True)]
    return runs + [
        (f"learning rate {way.name}", seed, run)
        for way in ways(lab)
        for seed, run in zip(lab.seeds, way.runs, strict=False)
    ]


def uses_replay(name: str) -> bool:
    """Whether a run of this name adds a replay loss."""
    return ARMS[name].replay is not None if name in ARMS else "replay" in name


SCRIPT = Script({"drift": End}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
