"""What each replay loss and coefficient keeps of the prior text, at matched new-task loss.

Regenerates the table in the README: every arm finetunes on the new text with the same steps; its forgetting at the
last step is compared with that of plain finetuning at the step at which plain finetuning had the same new-task loss
(linear interpolation of its trajectory). Mean and spread (largest minus smallest) over the seeds.

    python examples/coefficient_table.py --model DIR --prior stories.txt --prior-separator '<|endoftext|>' \
        --new spanish.txt --seeds 0 1 2

Prints the table and writes it, with every trajectory, to ``<output>/coefficients.json``. Takes about eighteen minutes
for a model of 650,000 parameters on two cores.
"""

import json
from dataclasses import asdict
from statistics import mean
from typing import Literal

import numpy as np
from finetune_text import Point, finetune, options_parser

from lightning_replay import SelfGeneratedReplay

ARMS: dict[str, tuple[Literal["kl", "ntp"], float]] = {
    "KL × 10": ("kl", 10.0),
    "KL × 3": ("kl", 3.0),
    "KL × 1": ("kl", 1.0),
    "next-token × 1": ("ntp", 1.0),
}


def forgetting_at(trajectory: list[Point], new: float) -> float:
    """Rise of the prior loss where a trajectory passes a new-task loss."""
    rising = sorted(trajectory, key=lambda point: point.new)
    return float(np.interp(new, [point.new for point in rising], [point.forgetting for point in rising]))


def main() -> None:
    """Run every arm with every seed."""
    parser = options_parser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which losses to try")
    parser.add_argument(
        "--sample-length", type=int, help="tokens sampled in one piece; the plugin's choice if left out"
    )
    options = parser.parse_args()
    options.quiet = True

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.arms}
    trajectories: dict[str, list[list[dict[str, float]]]] = {name: [] for name in ("none", *options.arms)}
    for seed in options.seeds:
        options.seed = seed
        plain = finetune(options, None, "none")
        trajectories["none"].append([asdict(point) for point in plain])
        for name in options.arms:
            loss, coefficient = ARMS[name]
            replay = SelfGeneratedReplay(loss, coefficient, sample_length=options.sample_length)
            points = finetune(options, replay, name.replace(" ", ""))
            trajectories[name].append([asdict(point) for point in points])
            end, without = points[-1], forgetting_at(plain, points[-1].new)
            removed = 1 - end.forgetting / without
            runs[name].append({"new": end.new, "forgetting": end.forgetting, "plain": without, "removed": removed})

    print(f"{'replay':<16}{'new-task loss':>16}{'forgetting':>20}{'plain at that loss':>20}{'removed':>18}")
    for name, figures in runs.items():
        columns = [[run[key] for run in figures] for key in ("new", "forgetting", "plain", "removed")]
        new, forgot, matched, share = ((mean(column), max(column) - min(column)) for column in columns)
        print(
            f"{name:<16}{new[0]:>10.2f} ± {new[1] / 2:.2f}{forgot[0]:>+13.3f} ± {forgot[1] / 2:.3f}"
            f"{matched[0]:>+13.2f} ± {matched[1] / 2:.2f}{share[0]:>11.1%} ± {share[1] / 2:.1%}"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"seeds": options.seeds, "runs": runs, "trajectories": trajectories}
    (options.output / "coefficients.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
