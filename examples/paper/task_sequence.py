"""Claim: with self-generated replay, a sequence of tasks is learned without forgetting.

    python examples/paper/task_sequence.py --model DIR --prior known.txt --new new.txt --other another.txt

The demo's four tasks, one after another; neither model nor texts are used.
"""

from statistics import mean
from typing import Any

from experiments import Lab, Report, cell, count, main, table
from matplotlib.figure import Figure
from runs import TaskSequence

from lightning_replay.demo.run import COEFFICIENT
from lightning_replay.demo.toy_tasks import TASKS
from lightning_replay.report.plots import Look

ARMS = {"without_replay": "no replay", "with_replay": "self-generated replay"}


def task_sequence(lab: Lab) -> Report:
    """Learn the tasks with every seed."""
    results = lab.results([TaskSequence(seed, lab.scale.task_steps) for seed in lab.seeds])

    def cells(arm: str) -> tuple[str, str]:
        runs = [result[arm] for result in results]
        accuracy = cell([run["average_accuracy"] for run in runs], ".1%")
        return accuracy, cell([run["backward_transfer"] for run in runs])

    def tasks_cells(arm: str) -> list[str]:
        return [cell([result[arm]["accuracy"][task] for result in results], ".1%") for task in TASKS]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (arm, name) in zip(axes, ARMS.items(), strict=True):
            run: dict[str, Any] = results[0][arm]
            for index, (task, curve) in enumerate(run["curves"].items()):
                axis.plot(run["steps"], curve, label=task, **Look.of(index).line())
            for end in run["ends"]:
                axis.axvline(end, color="0.6", linewidth=0.8, zorder=0)
            axis.set(title=name, xlabel="optimizer steps", ylim=(-0.02, 1.04))
        axes[0].set_ylabel("accuracy")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)

    (plain, lost), (replayed, kept) = cells("without_replay"), cells("with_replay")
    return Report(
        claim="A sequence of tasks is learned without forgetting",
        experiment=f"The demo's {len(TASKS)} tasks, {lab.scale.task_steps} steps each, KL × {COEFFICIENT:g}: average "
        f"accuracy and backward transfer after the last; {count(lab.seeds, 'seed')}",
        paper="99.9% and −0.0004 with replay; 30.7% and −0.92 without",
        ours=f"{replayed} and {kept} with replay; {plain} and {lost} without",
        details=table(
            ["arm", *TASKS, "average", "backward transfer"],
            [[name, *tasks_cells(arm), *cells(arm)] for arm, name in ARMS.items()],
        ),
        rows=[
            {
                "arm": name,
                "seed": seed,
                **result[arm]["accuracy"],
                "average_accuracy": mean(result[arm]["accuracy"].values()),
                "backward_transfer": result[arm]["backward_transfer"],
                "seconds": result[arm]["seconds"],
            }
            for seed, result in zip(lab.seeds, results, strict=True)
            for arm, name in ARMS.items()
        ],
        draw=draw,
        size=(7.5, 3.4),
    )


if __name__ == "__main__":
    main({"task_sequence": task_sequence}, __doc__)
