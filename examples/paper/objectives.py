"""What each objective, source of replay rows and coefficient keeps of the prior text: not a claim, but a choice.

    python examples/paper/objectives.py --model DIR --prior known.txt --new new.txt --other another.txt \
        --steps 400 --every 50 --held-out 256

Shares its runs with the other scripts where the settings are the same; `run_all.py` leaves it out.
"""

from statistics import mean

from arms import ARMS, comparison, lines, trajectories
from experiments import Lab, Report, count, main
from matplotlib.figure import Figure
from runs import forgetting

from lightning_replay.pictures import Look


def objectives(lab: Lab) -> Report:
    """Compare all arms."""
    arms = trajectories(lab, list(ARMS))

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for name, runs in arms.items():
            place = mean(run[-1].new_loss for run in runs), mean(forgetting(run) for run in runs)
            axis.plot(*place, marker="o", color=Look.of(0).color)
            axis.annotate(name, place, (4, 3), textcoords="offset points", fontsize=6)
        axis.set(xlabel="new-task loss, nats a token", ylabel="forgetting, nats a token")

    return Report(
        claim="What each objective, source and coefficient keeps",
        experiment=f"{len(ARMS)} ways to finetune, {lab.scale.steps} steps, {count(lab.seeds, 'seed')}",
        paper="",
        ours="below",
        details=comparison(arms),
        rows=lines(lab, arms),
        draw=draw,
        size=(7.5, 5.0),
    )


if __name__ == "__main__":
    main({"objectives": objectives}, __doc__)
