"""What each objective, source of replay rows and coefficient keeps of the prior text: not a claim, but a choice.

    python examples/paper/objectives.py --model DIR --prior known.txt --new new.txt --other another.txt

Writes the table in examples/results.md with `--fill examples/results.md`. Shares its runs with the other scripts;
`run_all.py` leaves it out. Takes 40 minutes on two cores for a model of 650,000 parameters, by itself.
"""

from statistics import mean

from arms import PLAIN, comparison, lines, trajectories
from experiments import Lab, Report, count, main
from matplotlib.figure import Figure
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


def objectives(lab: Lab) -> Report:
    """Compare all arms."""
    arms = trajectories(lab, OBJECTIVES)

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for name, runs in arms.items():
            place = mean(run[-1].new_loss for run in runs), mean(forgetting(run) for run in runs)
            axis.plot(*place, marker="o", color=Look.of(0).color)
            axis.annotate(name, place, (4, 3), textcoords="offset points", fontsize=6)
        axis.set(xlabel="new-task loss, nats a token", ylabel="forgetting, nats a token")

    return Report(
        claim="What each objective, source and coefficient keeps",
        experiment=f"{len(OBJECTIVES)} ways to finetune, {lab.scale.steps} steps, {count(lab.seeds, 'seed')}",
        paper="",
        ours="below",
        details=comparison(arms),
        rows=lines(lab, arms),
        draw=draw,
        size=(7.5, 5.0),
    )


if __name__ == "__main__":
    main({"objectives": objectives}, __doc__)
