"""What each objective, source of replay rows and coefficient keeps of the prior text: not a claim, but a choice.

    python examples/paper/objectives.py --model DIR --prior known.txt --new new.txt --other another.txt

Writes the table in examples/results.md with `--fill examples/results.md`. Shares its runs with the other scripts;
`run_all.py` leaves it out. Takes 40 minutes on two cores for a model of 650,000 parameters, by itself.
"""

from collections.abc import Sequence
from statistics import mean

from arms import PLAIN, ArmPoint, arm_points, comparison, removed, runs_by_arm
from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, count

from lightning_replay.report.plots import Look

OBJECTIVES = (
    PLAIN,
    "KL × 10",
    "KL × 3",
    "KL × 1",
    "next-token × 3",
    "next-token × 1",
    "mixed",
    "reverse KL × 10",
    "Jensen–Shannon × 40",
    "KL × 10, cached, k = 64",
    "KL × 10, rows from the start token",
    "KL × 10, documents stop and are packed",
    "KL × 10, live rows",
    "next-token × 1, live rows",
    "KL × 10, moving average",
    "KL × 10, real rows",
    "next-token × 1, real rows",
    "KL × 10, other text",
    "next-token × 1, other text",
    "KL on new rows × 1",
    "KL on new rows × 0.1",
)


def measure(lab: Lab) -> dict[str, list[ArmPoint]]:
    """Finetune in all arms."""
    return {"objectives": arm_points(lab, OBJECTIVES)}


def report(points: Sequence[ArmPoint]) -> Report:
    """Compare them."""
    arms, steps = runs_by_arm(points), max(point.step for point in points)

    def draw(figure: Figure) -> None:
        axis, shown = figure.add_subplot(), [name for name in reversed(arms) if name != PLAIN]
        for place, name in enumerate(shown):
            shares = removed(arms[name], arms[PLAIN])
            axis.plot([min(shares), max(shares)], [place, place], color=Look.of(0).color)
            axis.plot([mean(shares)], [place], marker="o", color=Look.of(0).color)
        axis.set_yticks(range(len(shown)), shown)
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.set(xlabel="share of plain finetuning's forgetting that is gone at the same new-task loss")

    return Report(
        claim="What each objective, source and coefficient keeps",
        experiment=f"{len(arms)} ways to finetune, {steps} steps, {count((point.seed for point in points), 'seed')}",
        paper="",
        ours="below",
        details=comparison(arms),
        draw=draw,
        size=(7.5, 5.0),
    )


SCRIPT = Script({"objectives": ArmPoint}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
