"""What a coefficient costs: forgetting and new-task loss after the same steps.

python examples/paper/coefficients.py --model DIR --prior known.txt --new new.txt --other another.txt
"""

from collections.abc import Sequence
from statistics import mean

from arms import KL_COEFFICIENTS, NEXT_TOKEN_COEFFICIENTS, PLAIN, ArmPoint, arm_points, comparison, removed, runs_by_arm
from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, cell, plain_numbers
from runs import forgetting

from lightning_replay.report.plots import Look

FAMILIES = {"KL": KL_COEFFICIENTS, "next-token": NEXT_TOKEN_COEFFICIENTS}
NAMES = [PLAIN, *(f"{loss} × {number:g}" for loss, numbers in FAMILIES.items() for number in numbers)]


def measure(lab: Lab) -> dict[str, list[ArmPoint]]:
    """Finetune with coefficients of both losses, on the model's own samples."""
    return {"coefficients": arm_points(lab, NAMES)}


def report(points: Sequence[ArmPoint]) -> Report:
    """Compare the coefficients."""
    arms, steps = runs_by_arm(points), max(point.step for point in points)
    ends = {
        name: (mean(run[-1].new_loss for run in runs), mean(forgetting(run) for run in runs))
        for name, runs in arms.items()
    }
    costs = [
        f"× {c:g}: {cell(removed(arms[f'KL × {c:g}'], arms[PLAIN]), '.1%')} gone at {ends[f'KL × {c:g}'][0]:.2f}"
        for c in (1.0, 3.0, 10.0, 30.0)
    ]

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for index, (loss, numbers) in enumerate(FAMILIES.items()):
            points = [ends[f"{loss} × {number:g}"] for number in numbers]
            axis.plot(*zip(*points, strict=True), marker="o", label=loss, **Look.of(index).line())
            for number, (new, forgot) in zip(numbers, points, strict=True):
                axis.annotate(f"{number:g}", (new, forgot), (5, 4), textcoords="offset points")
            last, name = points[-1], f"{loss} ×"
            axis.annotate(name, last, (5, -12), textcoords="offset points", color=Look.of(index).color)
        axis.plot(*ends[PLAIN], marker="o", color=Look.of(2).color)
        axis.annotate("no replay", ends[PLAIN], (6, 4), textcoords="offset points", color=Look.of(2).color)
        axis.set_yscale("symlog", linthresh=0.01)
        plain_numbers(axis.yaxis)
        axis.set(
            title=f"Coefficients after {steps} steps: left is learned, down is kept",
            xlabel="new-task loss, nats a token",
            ylabel="forgetting, nats a token",
        )
        axis.margins(x=0.12)

    return Report(
        claim="What a coefficient costs",
        experiment=f"KL × 0.01 to 30 and next-token × 0.1 to 10 on its own samples, {steps} steps",
        paper="10 for KL",
        ours=f"KL {'; '.join(costs)} (no replay: {ends[PLAIN][0]:.2f})",
        details=comparison(arms),
        draw=draw,
    )


SCRIPT = Script({"coefficients": ArmPoint}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
