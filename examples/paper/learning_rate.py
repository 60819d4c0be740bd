"""Claim: replay breaks the trade between the learning rate and forgetting.

    python examples/paper/learning_rate.py --model DIR --prior known.txt --new new.txt --other another.txt

Without replay a low learning rate forgets less and takes long. Every run here ends at one new-task loss, that of plain
finetuning after an eighth of its steps. Time is that of training and sampling on one core, without that of measuring.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from statistics import mean

from arms import SeedPoint, plain_level, runs_by
from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, cell, plain_numbers, scientific
from runs import Finetuning, Trajectory, at_new_loss, forgetting

from lightning_replay.report.plots import Look
from lightning_replay.utilities.tables import markdown

FRACTIONS = (0.05, 0.1, 0.2)
REPLAY = {"loss": "kl", "coefficient": 10.0}


@dataclass(frozen=True, kw_only=True)
class RatePoint(SeedPoint):
    """A measured point of a run.

    Attributes:
        learning_rate: Of the run.
        replay_fraction: Its share of replay rows.
        new_level: The new-task loss at which all runs end.
    """

    learning_rate: float
    replay_fraction: float
    new_level: float


@dataclass(frozen=True)
class Way:
    """A learning rate and a share of replay rows, with the runs that have it."""

    rate: float
    fraction: float
    runs: Sequence[Trajectory]
    level: float

    @property
    def name(self) -> str:
        """Its label in tables and pictures."""
        return scientific(self.rate) + (f", {self.fraction:.0%} replay" if self.fraction else "")

    def values(self, name: str) -> list[float]:
        """A measured quantity of each run, at the step at which it passed the level."""
        return [at_new_loss(run, self.level, name) for run in self.runs]

    @property
    def forgotten(self) -> list[float]:
        """Forgetting of each run at the step at which it passed the level."""
        return [forgetting(run, self.level) for run in self.runs]

    @property
    def place(self) -> tuple[float, float]:
        """Mean time and mean forgetting of the runs that reach the level."""
        known = [pair for pair in zip(self.values("cpu_seconds"), self.forgotten, strict=True) if not isnan(pair[0])]
        seconds, forgotten = zip(*known, strict=True) if known else ((float("nan"),), (float("nan"),))
        return mean(seconds), mean(forgotten)


def finetunings(lab: Lab, rate: float, fraction: float, level: float) -> list[Finetuning]:
    """The runs of a learning rate and a share of replay rows."""
    slowness = 1e-3 / rate
    every = max(1, min(100, round(5 * slowness)))
    steps = int(lab.scale.rate_steps * max(1.0, slowness)) * (4 if fraction else 1)
    replay = REPLAY if fraction else None
    return [
        lab.finetuning(
            seed, learning_rate=rate, steps=steps, every=every, until=level, replay=replay, replay_fraction=fraction
        )
        for seed in lab.seeds
    ]


def ways(lab: Lab) -> list[Way]:
    """All runs, the slowest first."""
    level = plain_level(lab, 1 / 8)
    pairs = [(rate, 0.0) for rate in sorted(lab.scale.rates)] + [(lab.learning_rate, share) for share in FRACTIONS]
    runs = [finetunings(lab, rate, fraction, level) for rate, fraction in pairs]
    measured = iter(lab.trajectories([run for part in runs for run in part]))
    return [
        Way(rate, fraction, [next(measured) for _ in part], level)
        for (rate, fraction), part in zip(pairs, runs, strict=True)
    ]


def measure(lab: Lab) -> dict[str, list[RatePoint]]:
    """Finetune in each way to one new-task loss."""
    points = [
        RatePoint(learning_rate=way.rate, replay_fraction=way.fraction, new_level=way.level, seed=seed, **vars(point))
        for way in ways(lab)
        for seed, run in zip(lab.seeds, way.runs, strict=True)
        for point in run
    ]
    return {"learning_rate": points}


def report(points: Sequence[RatePoint]) -> Report:
    """Compare the time that each way takes to that loss, and what it forgets."""
    found = runs_by(points, lambda point: (point.learning_rate, point.replay_fraction, point.new_level))
    all_ways = [Way(rate, fraction, runs, level) for (rate, fraction, level), runs in found.items()]
    plain, replayed = ([way for way in all_ways if bool(way.fraction) == replays] for replays in (False, True))
    reached = [way for way in plain if not isnan(way.place[0])]
    least = min(reached, key=lambda way: way.place[1])
    best = min(replayed, key=lambda way: way.place[1])
    # The fastest replay that forgets no more than the best rate without; if there is none, the one that forgets least.
    match = min((way for way in replayed if way.place[1] <= least.place[1]), key=lambda w: w.place[0], default=best)
    seconds, forgotten = least.place
    rates, usual = [way.rate for way in plain], scientific(replayed[0].rate)

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for index, (label, part) in enumerate((("without replay", plain), ("with self-generated replay", replayed))):
            look = Look.of(index)
            places = [way.place for way in part]
            axis.plot(*zip(*places, strict=True), marker="o", **look.line())
            names = [way.name for way in part]
            if index:  # these are too near to each other for a name each
                shares = [f"{way.fraction:.0%}" for way in part]
                names = [f"{usual}, {', '.join(shares)} replay rows", *[""] * (len(part) - 1)]
            for name, place in zip(names, places, strict=True):
                if not isnan(place[0]):
                    axis.annotate(name, place, (7, 5), textcoords="offset points", color=look.color)
            axis.plot([], [], label=label, marker="o", **look.line())
        axis.set_xscale("log")
        plain_numbers(axis.xaxis)
        axis.set(
            title=f"To a new-task loss of {all_ways[0].level:.2f}: left is fast, down is kept",
            xlabel="seconds of training and sampling on one core",
            ylabel="forgetting, nats a token",
        )
        axis.set_ylim(bottom=0.0)
        axis.legend(frameon=False)

    return Report(
        claim="Replay breaks the learning-rate trade",
        experiment=f"Learning rates {scientific(min(rates))} to {scientific(max(rates))} without replay against "
        f"{usual} with KL × 10 on 5 to 20% replay rows, to a new-task loss of {all_ways[0].level:.2f}",
        paper="lowest rate: the prior loss of replay in 38 times the compute, sampling not counted",
        ours=f"{least.name} forgets least without replay: {forgotten:+.3f} in {seconds:.0f} s; {match.name}: "
        f"{cell(match.forgotten)} in {cell(match.values('cpu_seconds'), '.1f')} s with sampling, "
        f"{seconds / match.place[0]:.1f} times less",
        details=markdown(
            ["learning rate", "steps", "seconds", "rows sampled", "forgetting"],
            [
                [
                    way.name,
                    cell(way.values("step"), ".0f"),
                    cell(way.values("cpu_seconds"), ".1f"),
                    cell(way.values("sampled_rows"), ".0f"),
                    cell(way.forgotten),
                ]
                for way in all_ways
            ],
        ),
        draw=draw,
    )


SCRIPT = Script({"learning_rate": RatePoint}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
