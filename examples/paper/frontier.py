"""What replay keeps for what it costs: few replay rows, used several times, in larger batches, shorter, and so on.

    python examples/paper/frontier.py --model DIR --prior known.txt --new new.txt \
        --other another.jsonl --other-column question answer
    python examples/paper/frontier.py ... --time   # when these runs are done, and nothing else uses the processor
    python examples/paper/frontier.py ... --finished   # what is known before all of them are done

Finetunes on the new text, on the other text, on the new text with a learning rate that falls to zero, and so five times
longer. The second command measures how long a short fit of each arm takes, in turn; the first one's table and picture
then have these times. All in all an hour and a half on two cores for a model of 650,000 parameters, ten minutes of
them for `--time`.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

from arms import PLAIN, Arm, at_one_loss, removed
from experiments import Lab, Report, cell, count, main, table, write_csv
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from runs import Finetuning, Point, Trajectory, at_new_loss, forgetting, trajectory

from lightning_replay import KL, Copy
from lightning_replay.report.plots import Look

TIMED_STEPS, ROUNDS = 48, 3
TIMES = "frontier_times.csv"
FRACTIONS, USES = (0.2, 0.1, 0.05), (1, 4, 16)
USUAL = {"loss": "kl", "coefficient": 10.0}
SIGNS = {1: "o", 2: "s", 4: "^", 16: "v", "auto": "*"}
"""In the picture, by the uses of a row."""


def spent(fraction: float, uses: int | Literal["auto"], coefficient: float = 10.0, **options: Any) -> Arm:
    """Replay of a share of rows, each used so often."""
    replay = {"loss": "kl", "coefficient": coefficient, "uses_per_sample": uses, **options}
    return Arm(replay, changes={"replay_fraction": fraction})


def all_arms(length: int) -> dict[str, Arm]:
    """What is compared, for new rows of a length."""
    return {
        PLAIN: Arm(),
        **{
            f"{fraction:g}, {count([None] * uses, 'use')}": spent(fraction, uses)
            for fraction in FRACTIONS
            for uses in USES
        },
        "0.1, 2 uses": spent(0.1, 2),
        "0.05, 2 uses": spent(0.05, 2),
        "0.07, 1 use": spent(0.07, 1),
        "0.1, auto": spent(0.1, "auto"),
        "0.05, auto": spent(0.05, "auto"),
        "0.1, 4 uses, every 2 steps": spent(0.1, 4, every_n_steps=2),
        "0.1, 4 uses, every 4 steps": spent(0.1, 4, every_n_steps=4),
        "0.05, 1 use, every 4 steps": spent(0.05, 1, every_n_steps=4),
        "0.1, 4 uses, half rows": spent(0.1, 4, sequence_length=length // 2),
        "0.1, 1 use, half rows": spent(0.1, 1, sequence_length=length // 2),
        "0.05, 4 uses, × 20": spent(0.05, 4, 20.0),
        "0.05, 4 uses, × 3": spent(0.05, 4, 3.0),
        "0.05, 1 use, × 3": spent(0.05, 1, 3.0),
        "0.1, 4 uses, cached": spent(0.1, 4, reference="cached"),
        "0.2, 1 use, copy in 8 bits": spent(0.2, 1, reference=Copy(quantize="int8")),
        "0.1, 4 uses, refills of 32": spent(0.1, 4, refill_rows=32),
        "0.1, 2 uses, refills of 32": spent(0.1, 2, refill_rows=32),
        "0.05, 2 uses, refills of 32": spent(0.05, 2, refill_rows=32),
        "0.1, 4 uses, temperature 2": spent(0.1, 4, 40.0, loss=KL(temperature=2.0)),  # the same curvature
        "0.1, 4 uses, next-token × 1": spent(0.1, 4, 1.0, loss="ntp"),
        "0.1, 1 use, next-token × 1": spent(0.1, 1, 1.0, loss="ntp"),
    }


@dataclass(frozen=True)
class Pair:
    """A text to finetune on.

    Attributes:
        name: In tables and pictures.
        names: Of the arms that are compared.
        changes: What is different for all of them.
    """

    name: str
    names: Sequence[str]
    changes: dict[str, Any] = field(default_factory=dict)

    def run(self, lab: Lab, name: str, seed: int) -> Finetuning:
        """The run of an arm with a seed."""
        run = replace(all_arms(lab.scale.length)[name].run(lab, seed), **self.changes)
        # An arm is compared where it ends, as a rule, and plain finetuning anywhere on its way.
        return replace(run, every=max(1, run.steps // 8) if name == PLAIN else run.steps)


TELLING = (PLAIN, "0.2, 1 use", "0.1, 1 use", "0.1, 4 uses", "0.05, 1 use", "0.05, 4 uses", "0.1, 4 uses, half rows")
FEW = (PLAIN, "0.05, 1 use", "0.1, 2 uses")
LONG = (PLAIN, "0.05, 4 uses", "0.1, 4 uses", "0.05, auto")


def all_pairs(lab: Lab) -> list[Pair]:
    """The texts, from the one with all arms to the one with few."""
    longer = 5 * lab.scale.steps
    return [
        Pair("Spanish", list(all_arms(lab.scale.length))),
        Pair("mathematics", TELLING, {"new": lab.other}),
        Pair("Spanish, cosine", FEW, {"schedule": "cosine"}),
        Pair(f"Spanish, {longer:,} steps, cosine", LONG, {"steps": longer, "schedule": "cosine"}),
    ]


@dataclass(frozen=True)
class Result:
    """What an arm kept of the prior text in the runs of a pair, and what it took.

    Attributes:
        pair: The text that it was finetuned on.
        arm: Its name.
        settings: A finetuning of the arm.
        seeds: Of the runs.
        runs: What was measured, a run for each seed.
        plain: The same without replay.
        level: A new-task loss that all arms of the pair reach.
        times: Of short fits in rounds of all arms, as ``measured_times`` returns them; none if not measured.
    """

    pair: str
    arm: str
    settings: Finetuning
    seeds: Sequence[int]
    runs: Sequence[Trajectory]
    plain: Sequence[Trajectory]
    level: float
    times: Sequence[Mapping[str, float]]

    @property
    def removed(self) -> list[float]:
        """For each seed, the share of plain finetuning's forgetting that is gone, at the same new-task loss."""
        return removed(self.runs, self.plain)

    @property
    def removed_there(self) -> list[float]:
        """The same at the loss that all arms reach."""
        pairs = zip(self.runs, self.plain, strict=True)
        return [1 - forgetting(ours, self.level) / forgetting(theirs, self.level) for ours, theirs in pairs]

    @property
    def steps(self) -> list[float]:
        """Steps of each run to the loss that all arms reach."""
        return [at_new_loss(run, self.level, "step") for run in self.runs]

    @property
    def replay_tokens(self) -> float:
        """Tokens in replay rows for each step."""
        options, fraction = self.settings.replay or {}, self.settings.replay_fraction
        length = options.get("sequence_length", self.settings.length)
        return self.settings.rows * fraction / (1 - fraction) * length if options else 0.0

    @property
    def short(self) -> list[float]:
        """Time of the short fit of each round over that of plain finetuning, sampling included."""
        return [time["seconds"] / time["plain_seconds"] for time in self.times]

    @property
    def long(self) -> list[float]:
        """The same for the runs of this pair, which sample fewer rows a step than a short fit with the same settings.

        A step's time is that of a step of the short fit, and a row's that of sampling a row in it.
        """
        rows = self.runs[0][-1].sampled_rows / self.settings.steps
        return [
            (
                (time["seconds"] - time["sampling_seconds"]) / time["steps"]
                + time["sampling_seconds"] / max(1.0, time["sampled_rows"]) * rows
            )
            / (time["plain_seconds"] / time["steps"])
            for time in self.times
        ]

    @property
    def to_level(self) -> list[float]:
        """The same for the time to the loss that all arms reach."""
        plain = mean(at_new_loss(run, self.level, "step") for run in self.plain)
        return [ratio * mean(self.steps) / plain for ratio in self.long]

    def lines(self) -> list[dict[str, Any]]:
        """A line for each seed, for a CSV file."""
        pairs = at_one_loss(self.runs, self.plain)
        return [
            {
                "pair": self.pair,
                "arm": self.arm,
                "seed": seed,
                "replay_tokens_a_step": round(self.replay_tokens, 1),
                "sampled_rows": run[-1].sampled_rows,
                "new_loss": run[-1].new_loss,
                "forgetting": forgetting(run),
                "forgetting_at_one_loss": ours,
                "plain_forgetting_at_one_loss": theirs,
                "removed": 1 - ours / theirs,
                "common_new_loss": self.level,
                "steps_to_common": steps,
                "removed_at_common": there,
            }
            for seed, run, (ours, theirs), steps, there in zip(
                self.seeds, self.runs, pairs, self.steps, self.removed_there, strict=True
            )
        ]

    def cells(self) -> list[str]:
        """Its line of the table."""
        return [
            self.arm,
            str(len(self.seeds)),
            f"{self.replay_tokens:.0f}",
            f"{mean(run[-1].sampled_rows for run in self.runs):.0f}",
            cell([run[-1].new_loss for run in self.runs], ".2f"),
            cell([forgetting(run) for run in self.runs]),
            "" if self.arm == PLAIN else cell(self.removed, ".1%"),
            cell(self.steps, ".0f"),
            "" if self.arm == PLAIN else cell(self.removed_there, ".1%"),
            *(extremes(times) if times else "" for times in (self.long, self.to_level, self.short)),
        ]


def frontier(lab: Lab) -> Report:
    """Compare what the arms keep, and what they cost."""
    pairs, arms = all_pairs(lab), all_arms(lab.scale.length)
    runs = {
        (pair.name, name, seed): pair.run(lab, name, seed)
        for seed in lab.seeds
        for pair in pairs
        for name in pair.names
    }
    done = {key: trajectory(result) for key, result in lab.done(runs).items()}
    if lab.time:
        write_csv(lab.folder / TIMES, measured_times(lab, arms))
    times = read_times(lab.folder / TIMES)

    def result(pair: Pair, name: str) -> Result:
        seeds = [seed for seed in lab.seeds if {(pair.name, name, seed), (pair.name, PLAIN, seed)} <= done.keys()]
        ours, plain = ([done[pair.name, arm, seed] for seed in seeds] for arm in (name, PLAIN))
        level = max(min(point.new_loss for point in done[key]) for key in done if key[0] == pair.name)
        return Result(pair.name, name, pair.run(lab, name, 0), seeds, ours, plain, level, times.get(name, []))

    found = {pair.name: [result(pair, name) for name in pair.names] for pair in pairs}
    results = {pair: [one for one in arms if one.seeds] for pair, arms in found.items()}

    def draw(figure: Figure) -> None:
        pair, found = next(iter(results.items()))
        left, right = figure.subplots(1, 2)
        arms_drawn = [one for one in found if one.arm != PLAIN]
        draw_arms(left, arms_drawn, lambda one: (one.long, one.replay_tokens, one.removed))
        draw_arms(right, arms_drawn, lambda one: (one.to_level, mean(one.steps), one.removed_there))
        left.set(title=f"{pair}: {lab.scale.steps} steps", ylabel="share of forgetting removed")
        right.set(title=f"To a new-task loss of {found[0].level:.2f}")
        for axis, unit in ((left, "replay tokens a step"), (right, "steps")):
            axis.set_xlabel("time ÷ without replay" if arms_drawn[0].times else unit)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)

    return Report(
        claim="Most of what replay keeps costs little",
        experiment=f"{len(arms)} arms, {len(pairs)} texts, {count(lab.seeds, 'seed')}",
        paper="",
        ours="below",
        details="\n\n".join(f"{pair}:\n\n{table_of(found)}" for pair, found in results.items()),
        rows=[line for found in results.values() for one in found for line in one.lines()],
        draw=draw,
        size=(10.0, 3.8),
    )


def measured_times(lab: Lab, arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Time short fits of all arms in rounds: each arm once, then each arm again, sampling included.

    The first round, of few steps, is not counted, unless there is no other. Arms that do the same work are measured
    once.
    """
    steps, rounds = (TIMED_STEPS, ROUNDS) if lab.scale.steps >= TIMED_STEPS else (4, 0)
    work: dict[str, list[str]] = {}
    for name, arm in arms.items():
        work.setdefault(work_of(arm), []).append(name)
    found = []
    for number in range(rounds + 1):
        for names in work.values():
            run = arms[names[0]].run(lab, number)
            # Measured in the beginning and at the end alone.
            run = replace(run, steps=steps if number else 4, every=5 * steps, held_out=lab.scale.rows)
            point = Point(**run.run(lab.folder)["points"][-1])
            if names[0] == PLAIN:
                plain = point.seconds
            if number or not rounds:
                found += [
                    {
                        "arm": name,
                        "round": number,
                        "steps": steps,
                        "seconds": point.seconds,
                        "plain_seconds": plain,
                        "sampling_seconds": point.sampling_seconds,
                        "sampled_rows": point.sampled_rows,
                    }
                    for name in names
                ]
        print(f"timed: round {number} of {rounds}", flush=True)
    return found


def read_times(file: Path) -> dict[str, list[dict[str, float]]]:
    """By arm, what ``measured_times`` has found; empty if there is no such file yet."""
    times: dict[str, list[dict[str, float]]] = {}
    if file.exists():
        with file.open() as lines:
            for line in csv.DictReader(lines):
                times.setdefault(line.pop("arm"), []).append({key: float(value) for key, value in line.items()})
    return times


def work_of(arm: Arm) -> str:
    """What an arm's time depends on: all but the coefficient and the temperature."""
    options = dict(arm.replay or {}, coefficient=0)
    if isinstance(options.get("loss"), KL):
        options["loss"] = "kl"
    return repr(asdict(replace(arm, replay=options if arm.replay else None)))


def extremes(values: Sequence[float]) -> str:
    """The median of some ratios, and the least and the largest."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table_of(results: Sequence[Result]) -> str:
    """The table of a pair."""
    level = f"{results[0].level:.2f}"
    header = ["arm", "seeds", "replay tokens a step", "rows sampled", "new-task loss", "forgetting", "removed"]
    header += [f"steps to {level}", "removed there", "time ÷ plain", f"to {level}", f"{TIMED_STEPS} steps"]
    return table(header, [result.cells() for result in results])


def draw_arms(
    axis: Any, results: Sequence[Result], place: Callable[[Result], tuple[Sequence[float], float, Sequence[float]]]
) -> None:
    """Draw what each arm keeps over its time; as long as no times are measured, over another measure of it.

    Colours are shares of rows, signs are uses; arms that change something else are grey.

    Args:
        axis: To draw on.
        results: Of the arms.
        place: Times, the other measure, and shares removed.
    """
    for one in results:
        times, other, shares = place(one)
        x, y = median(times) if times else other, mean(shares)
        options, fraction = one.settings.replay or {}, one.settings.replay_fraction
        is_usual = set(options) == {*USUAL, "uses_per_sample"} and options == {**options, **USUAL}
        color = Look.of(FRACTIONS.index(fraction)).color if is_usual and fraction in FRACTIONS else "0.6"
        sign, spread = SIGNS[options["uses_per_sample"]], [[y - min(shares)], [max(shares) - y]]
        axis.errorbar(x, y, spread, marker=sign, markersize=5, color=color, linewidth=0.8, zorder=2 + is_usual)
    for index, fraction in enumerate(FRACTIONS):
        axis.plot([], [], color=Look.of(index).color, linewidth=3, label=f"{fraction:g} of the rows")
    axis.plot([], [], color="0.6", linewidth=3, label="another change")
    for uses, sign in SIGNS.items():
        axis.plot([], [], color="0.3", marker=sign, linewidth=0, label="1 use" if uses == 1 else f"{uses} uses")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


if __name__ == "__main__":
    main({"frontier": frontier}, __doc__)
