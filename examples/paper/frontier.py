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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from statistics import mean, median
from typing import Any

from arms import PLAIN, Arm, at_one_loss
from experiments import Lab, main
from frontier_arms import FRACTIONS, all_arms, all_pairs
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from reports import Report, Script, cell, count
from runs import Finetuning, Point, Trajectory, at_new_loss, forgetting, trajectory

from lightning_replay import KL
from lightning_replay.report.plots import Look
from lightning_replay.utilities.tables import markdown

TIMED_STEPS, ROUNDS = 48, 3
SIGNS = {"1 use": "o", "2 uses": "s", "4 uses": "^", "16 uses": "v", "auto": "*"}
"""In the picture, by the uses of a row."""


@dataclass(frozen=True)
class Ended:
    """What an arm kept of the prior text in a run: a line of the CSV file.

    Attributes:
        pair: The text that it was finetuned on.
        arm: Its name.
        seed: Of the run.
        steps: Of the run.
        replay_tokens_a_step: Tokens in replay rows for each step.
        sampled_rows: Replay rows that were sampled.
        new_loss: The last new-task loss.
        forgetting: The rise of the prior loss.
        forgetting_at_one_loss: The same at the lowest new-task loss that plain finetuning reaches as well.
        plain_forgetting_at_one_loss: That of plain finetuning there.
        removed: The share of plain finetuning's forgetting that is gone there.
        common_new_loss: A new-task loss that all arms of the pair reach.
        steps_to_common: Steps to that.
        removed_at_common: The share of plain finetuning's forgetting that is gone there.
    """

    pair: str
    arm: str
    seed: int
    steps: int
    replay_tokens_a_step: float
    sampled_rows: int
    new_loss: float
    forgetting: float
    forgetting_at_one_loss: float
    plain_forgetting_at_one_loss: float
    removed: float
    common_new_loss: float
    steps_to_common: float
    removed_at_common: float


@dataclass(frozen=True)
class Timed:
    """A short fit of an arm, sampling included.

    Attributes:
        arm: Its name.
        round: Of all arms; the seed of the fit.
        steps: Of the fit.
        seconds: It took.
        plain_seconds: Those of plain finetuning in the round.
        sampling_seconds: Of ``seconds``, those that sampling took.
        sampled_rows: Replay rows that were sampled.
    """

    arm: str
    round: int
    steps: int
    seconds: float
    plain_seconds: float
    sampling_seconds: float
    sampled_rows: int


@dataclass(frozen=True)
class Result:
    """What an arm kept of the prior text in the runs of a pair, and what it took.

    Attributes:
        arm: Its name.
        runs: Of the arm, a run for each seed.
        plain: The same without replay.
        times: Of short fits in rounds of all arms; none if not measured.
    """

    arm: str
    runs: Sequence[Ended]
    plain: Sequence[Ended]
    times: Sequence[Timed]

    def values(self, name: str) -> list[float]:
        """A figure of each run."""
        return [getattr(run, name) for run in self.runs]

    @property
    def short(self) -> list[float]:
        """Time of the short fit of each round over that of plain finetuning, sampling included."""
        return [time.seconds / time.plain_seconds for time in self.times]

    @property
    def long(self) -> list[float]:
        """The same for the runs of this pair, which sample fewer rows a step than a short fit with the same settings.

        A step's time is that of a step of the short fit, and a row's that of sampling a row in it.
        """
        rows = self.runs[0].sampled_rows / self.runs[0].steps
        return [
            (
                (time.seconds - time.sampling_seconds) / time.steps
                + time.sampling_seconds / max(1, time.sampled_rows) * rows
            )
            / (time.plain_seconds / time.steps)
            for time in self.times
        ]

    @property
    def to_level(self) -> list[float]:
        """The same for the time to the loss that all arms reach."""
        plain = mean(run.steps_to_common for run in self.plain)
        return [ratio * mean(self.values("steps_to_common")) / plain for ratio in self.long]

    def cells(self) -> list[str]:
        """Its line of the table."""
        return [
            self.arm,
            str(len(self.runs)),
            f"{self.runs[0].replay_tokens_a_step:.0f}",
            f"{mean(self.values('sampled_rows')):.0f}",
            cell(self.values("new_loss"), ".2f"),
            cell(self.values("forgetting")),
            "" if self.arm == PLAIN else cell(self.values("removed"), ".1%"),
            cell(self.values("steps_to_common"), ".0f"),
            "" if self.arm == PLAIN else cell(self.values("removed_at_common"), ".1%"),
            *(extremes(times) if times else "" for times in (self.long, self.to_level, self.short)),
        ]


def measure(lab: Lab) -> dict[str, Sequence[Ended | Timed]]:
    """Do the runs, and with ``--time`` the short fits."""
    pairs = all_pairs(lab)
    runs = {
        (pair.name, name, seed): pair.run(lab, name, seed)
        for seed in lab.seeds
        for pair in pairs
        for name in pair.names
    }
    done = {key: trajectory(result) for key, result in lab.done(runs).items()}
    level = {
        pair.name: max((min(point.new_loss for point in done[key]) for key in done if key[0] == pair.name), default=nan)
        for pair in pairs
    }
    ended = [
        ended_run(pair.name, name, run, done[pair.name, name, seed], done[pair.name, PLAIN, seed], level[pair.name])
        for pair in pairs
        for name in pair.names
        for seed in lab.seeds
        if {(pair.name, name, seed), (pair.name, PLAIN, seed)} <= done.keys()
        for run in [runs[pair.name, name, seed]]
    ]
    if lab.time:
        return {"frontier": ended, "frontier_times": measured_times(lab, all_arms(lab.scale.length))}
    timed_before = (lab.folder / "frontier_times.csv").exists()
    return {"frontier": ended} if timed_before else {"frontier": ended, "frontier_times": []}


def ended_run(pair: str, arm: str, settings: Finetuning, run: Trajectory, plain: Trajectory, level: float) -> Ended:
    """The line of a run.

    Args:
        pair: The text that it was finetuned on.
        arm: Its name.
        settings: Of the run.
        run: What was measured.
        plain: The same without replay.
        level: A new-task loss that all arms of the pair reach.
    """
    ((ours, theirs),) = at_one_loss([run], [plain])
    return Ended(
        pair=pair,
        arm=arm,
        seed=settings.seed,
        steps=settings.steps,
        replay_tokens_a_step=round(replay_tokens(settings), 1),
        sampled_rows=run[-1].sampled_rows,
        new_loss=run[-1].new_loss,
        forgetting=forgetting(run),
        forgetting_at_one_loss=ours,
        plain_forgetting_at_one_loss=theirs,
        removed=1 - ours / theirs,
        common_new_loss=level,
        steps_to_common=at_new_loss(run, level, "step"),
        removed_at_common=1 - forgetting(run, level) / forgetting(plain, level),
    )


def replay_tokens(settings: Finetuning) -> float:
    """Tokens in replay rows for each step of a run."""
    options, fraction = settings.replay or {}, settings.replay_fraction
    length = options.get("sequence_length", settings.length)
    return float(settings.rows * fraction / (1 - fraction) * length) if options else 0.0


def report(ended: Sequence[Ended], timed: Sequence[Timed]) -> Report:
    """Compare what the arms keep, and what they cost."""
    results: dict[str, list[Result]] = {}
    for pair, arm in dict.fromkeys((run.pair, run.arm) for run in ended):
        here = [run for run in ended if run.pair == pair]
        runs = [run for run in here if run.arm == arm]
        plain = [run for run in here if run.arm == PLAIN and run.seed in {each.seed for each in runs}]
        times = [time for time in timed if time.arm == arm]
        results.setdefault(pair, []).append(Result(arm, runs, plain, times))

    def draw(figure: Figure) -> None:
        pair, found = next(iter(results.items()))
        left, right = figure.subplots(1, 2)
        arms = [one for one in found if one.arm != PLAIN]
        draw_arms(left, arms, lambda one: (one.long, one.runs[0].replay_tokens_a_step, one.values("removed")))
        draw_arms(
            right,
            arms,
            lambda one: (one.to_level, mean(one.values("steps_to_common")), one.values("removed_at_common")),
        )
        first = arms[0].runs[0]
        left.set(title=f"{pair}: {first.steps} steps", ylabel="share of forgetting removed")
        right.set(title=f"To a new-task loss of {first.common_new_loss:.2f}")
        for axis, unit in ((left, "replay tokens a step"), (right, "steps")):
            axis.set_xlabel("time ÷ without replay" if arms[0].times else unit)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)

    return Report(
        claim="Most of what replay keeps costs little",
        experiment=f"{count((run.arm for run in ended), 'arm')}, {count(results, 'text')}, "
        f"{count((run.seed for run in ended), 'seed')}",
        paper="",
        ours="below",
        details="\n\n".join(f"{pair}:\n\n{table_of(found)}" for pair, found in results.items()),
        draw=draw,
        size=(10.0, 3.8),
    )


def measured_times(lab: Lab, arms: Mapping[str, Arm]) -> list[Timed]:
    """Time short fits of all arms in rounds: each arm once, then each arm again, sampling included.

    The first round, of few steps, is not counted, unless there is no other. Arms that do the same work are measured
    once.
    """
    steps, rounds = (TIMED_STEPS, ROUNDS) if lab.scale.steps >= TIMED_STEPS else (4, 0)
    work: dict[str, list[str]] = {}
    for name, arm in arms.items():
        work.setdefault(work_of(arm), []).append(name)
    found: list[Timed] = []
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
                    Timed(name, number, steps, point.seconds, plain, point.sampling_seconds, point.sampled_rows)
                    for name in names
                ]
        print(f"timed: round {number} of {rounds}", flush=True)
    return found


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
    level = f"{results[0].runs[0].common_new_loss:.2f}"
    header = ["arm", "seeds", "replay tokens a step", "rows sampled", "new-task loss", "forgetting", "removed"]
    header += [f"steps to {level}", "removed there", "time ÷ plain", f"to {level}", f"{TIMED_STEPS} steps"]
    return markdown(header, [result.cells() for result in results])


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
    colors = {f"{fraction:g}": Look.of(index).color for index, fraction in enumerate(FRACTIONS)}
    for one in results:
        times, other, shares = place(one)
        x, y = median(times) if times else other, mean(shares)
        fraction, uses, *changes = one.arm.split(", ")
        color = "0.6" if changes else colors.get(fraction, "0.6")
        spread = [[y - min(shares)], [max(shares) - y]]
        axis.errorbar(
            x, y, spread, marker=SIGNS[uses], markersize=5, color=color, linewidth=0.8, zorder=2 + (not changes)
        )
    for fraction, color in colors.items():
        axis.plot([], [], color=color, linewidth=3, label=f"{fraction} of the rows")
    axis.plot([], [], color="0.6", linewidth=3, label="another change")
    for uses, sign in SIGNS.items():
        axis.plot([], [], color="0.3", marker=sign, linewidth=0, label=uses)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


SCRIPT = Script({"frontier": Ended, "frontier_times": Timed}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
