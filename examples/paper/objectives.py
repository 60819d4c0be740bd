"""What each objective, source of replay rows and coefficient keeps of the prior text: not a claim, but a choice.

    python examples/paper/objectives.py --model DIR --prior known.txt --new new.txt --other another.txt

Writes the table in examples/results.md with `--fill examples/results.md`. Shares its runs with the other scripts;
`run_all.py` leaves it out. Takes 40 minutes on two cores for a model of 650,000 parameters, by itself.
"""

from collections.abc import Sequence
from statistics import mean

from arms import PLAIN, ArmPoint, arm_points, comparison, runs_by_arm
from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, count
from runs import forgetting

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
        axis = figure.add_subplot()
        for name, runs in arms.items():
            place = mean(run[-1].new_loss for run in runs), mean(forgetting(run) for run in runs)
            axis.plot(*place, marker="o", color=Look.of(0).color)
            axis.annotate(name, place, (4, 3), textcoords="offset points", fontsize=6)
        axis.set(xlabel="new-task loss, nats a token", ylabel="forgetting, nats a token")

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
