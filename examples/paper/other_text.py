"""Claim: replaying the wrong text hurts next-token loss, not KL.

python examples/paper/other_text.py --model DIR --prior known.txt --new new.txt --other another.txt
"""

from collections.abc import Sequence

from arms import PLAIN, ArmPoint, arm_points, average, comparison, removed, runs_by_arm
from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, cell

from lightning_replay.report.plots import Look

LOSSES = ("KL × 10", "next-token × 1")
TEXTS = {"": "its own samples", ", real rows": "prior text", ", other text": "other text"}
NAMES = [PLAIN, *(loss + text for loss in LOSSES for text in TEXTS)]


def measure(lab: Lab) -> dict[str, list[ArmPoint]]:
    """Finetune with both losses on rows of the model's own, of prior text and of other text."""
    return {"other_text": arm_points(lab, NAMES)}


def report(points: Sequence[ArmPoint]) -> Report:
    """Compare both losses on each kind of rows."""
    arms = runs_by_arm(points)
    gone = {loss: cell(removed(arms[f"{loss}, other text"], arms[PLAIN]), ".1%") for loss in LOSSES}

    def draw(figure: Figure) -> None:
        for axis, loss in zip(figure.subplots(1, 2, sharex=True, sharey=True), LOSSES, strict=True):
            curves = {"no replay": arms[PLAIN]} | {text: arms[loss + rows] for rows, text in TEXTS.items()}
            for index, (text, runs) in enumerate(curves.items()):
                new, prior = average(runs, "new_loss"), average(runs, "prior_loss")
                axis.plot(new, [loss - prior[0] for loss in prior], label=text, **Look.of(index).line())
            axis.set(title=loss, xlabel="new-task loss, nats a token")
        axis.invert_xaxis()
        figure.axes[0].set_ylabel("forgetting, nats a token")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)

    return Report(
        claim="Replay of the wrong text hurts next-token loss, not KL",
        experiment="The same, replaying text of another kind",
        paper="task average of 53.7 before: KL on the wrong text 52.7, next-token 46.0, no replay 49.1",
        ours=f"forgetting gone with KL × 10 {gone['KL × 10']}, with next-token × 1 {gone['next-token × 1']}",
        details=comparison(arms),
        draw=draw,
        size=(7.5, 3.6),
    )


SCRIPT = Script({"other_text": ArmPoint}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
