"""The demo's sequence of tasks with each kind of reference model.

Shows what a reference that is cached, in part or in whole, or that follows the model costs in accuracy against a frozen
copy. Gives the figures in examples/results.md.

    python examples/toy_references.py --seeds 0 1 2
    python examples/toy_references.py --quick

Prints final accuracy of each task, average accuracy and backward transfer: mean and half the distance of the extremes
over the seeds. Takes some minutes for each seed on two cores. With --quick, a few steps show in 20 seconds that
it works, and nothing else.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import mean

from rich.console import Console

from lightning_replay import Cached
from lightning_replay.demo.run import learn_sequence, replay_of
from lightning_replay.demo.toy_tasks import TASKS, VOCABULARY

STEPS = 400
"""Optimizer steps of each task but the first, which is trained until it is learned."""
ARMS = {
    "none": None,
    "frozen copy": replay_of,
    f"cached, k = {VOCABULARY} (all)": partial(replay_of, reference=Cached(top_k=VOCABULARY)),
    "cached, k = 8": partial(replay_of, reference=Cached(top_k=8)),
    "moving average, decay 0.999": partial(replay_of, reference="ema"),
}


def cell(values: list[float], form: str) -> str:
    """Mean and half the distance of the extremes."""
    return f"{mean(values):{form}} ± {(max(values) - min(values)) / 2:{form}}"


def main() -> None:
    """Learn the sequence with every reference and seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/references.json"), help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="the first seed and a few steps, to see that it runs")
    options = parser.parse_args()
    seeds, steps = (options.seeds[:1], 5) if options.quick else (options.seeds, STEPS)
    summaries = []
    for seed in seeds:
        learned = learn_sequence(ARMS, seed, Console(), steps)
        summaries.append({arm: run.summary() for arm, run in learned.items()})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(summaries, indent=2) + "\n")
    print(f"| reference | {' | '.join(TASKS)} | average | backward transfer |")
    print("|---" * (len(TASKS) + 3) + "|")
    for arm in ARMS:
        runs = [summary[arm] for summary in summaries]
        cells = [cell([run["accuracy"][task] for run in runs], ".1%") for task in TASKS]
        cells.append(cell([run["average_accuracy"] for run in runs], ".1%"))
        cells.append(cell([run["backward_transfer"] for run in runs], ".3f"))
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
