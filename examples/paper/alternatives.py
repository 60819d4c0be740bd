"""What would be cheaper than replay: other ways not to forget, at one new-task loss, with their time and memory.

    python examples/paper/alternatives.py --model DIR --prior known.txt --new new.txt \
        --other another.jsonl --other-column question answer

Plain finetuning, a tenth of the rate, LoRA, a frozen lower half, L2-SP, EWC, OSF, learning without forgetting, and
weight interpolation after the fit, beside replay. All are compared at the new-task loss at which KL × 10 ends. Of an
arm with several settings, all are tried with the first seed, and the one that forgets least there goes on to the other
seeds; such runs end when they reach that loss, and have three times the steps. Takes an hour on one core for a model of
650,000 parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan
from statistics import mean
from typing import Any

import numpy as np
from alternative_runs import Alternative
from arms import PLAIN, SeedPoint, runs_by
from experiments import Lab, main
from matplotlib.figure import Figure
from reports import Report, Script, cell, count, plain_numbers, scientific
from runs import Trajectory, at_new_loss, forgetting, trajectory
from transformers import AutoConfig

from lightning_replay.report.plots import Look
from lightning_replay.utilities.tables import markdown

DEFAULT, PAPER = "KL replay, default", "KL replay, the paper's"
WEAK, INTERPOLATED = "KL replay × 1", ", interpolated"
SWEEP = tuple(step / 20 for step in range(21))
"""Shares of the finetuned weights in an interpolation."""
PATIENCE = 3
"""Times the steps of plain finetuning that an arm may take to the new-task loss."""
PANELS = {
    "Replay": (DEFAULT, PAPER, WEAK, "KL replay, other text"),
    "Next-token replay": ("next-token replay", "next-token replay, other text"),
    "Interpolated after the fit": (f"{WEAK}{INTERPOLATED}", f"{PLAIN}{INTERPOLATED}"),
    "On new rows alone": ("LwF", "a tenth of the rate"),
    "Pulled back": ("EWC", "L2-SP"),
    "Partly frozen": ("OSF", "lower half frozen"),
    "LoRA": ("LoRA, rank 4", "LoRA, rank 16", "LoRA, full rank", "LoRA, rank 16, and embeddings"),
}
"""The arms of each part of the picture. Plain finetuning is in all of them."""


@dataclass(frozen=True, kw_only=True)
class Tried(SeedPoint):
    """A measured point of a run.

    Attributes:
        arm: Of the run.
        setting: Of the arm; empty if there is only one.
        chosen: Whether it is the best one.
        weight: The share of the finetuned weights in an interpolation after the fit; None during the fit.
        bytes: What the fit holds.
    """

    arm: str
    setting: str
    chosen: bool
    weight: float | None
    bytes: int


@dataclass(frozen=True)
class Found:
    """An arm with its best setting, a run for each seed.

    Attributes:
        arm: Its name.
        setting: The setting; empty if it was the only one.
        runs: What was measured, in an order in which the new-task loss falls.
        ends: The last measurement of each fit.
        bytes: What a fit holds.
        plain: Plain finetuning; None for itself.
        level: The new-task loss to compare at.
    """

    arm: str
    setting: str
    runs: Sequence[Trajectory]
    ends: Trajectory
    bytes: int
    plain: "Found | None"
    level: float

    @property
    def forgotten(self) -> list[float]:
        """Forgetting of each run at the level; NaN where it is not reached."""
        return [forgetting(run, self.level) for run in self.runs]

    @property
    def removed(self) -> list[float]:
        """The share of plain finetuning's forgetting at the level that is gone."""
        base = self.plain or self
        return [1 - ours / theirs for ours, theirs in zip(self.forgotten, base.forgotten, strict=True)]

    @property
    def to_level(self) -> float:
        """Mean processor time to the level over that of plain finetuning, of the runs that reach it."""
        base = self.plain or self
        seconds = [at_new_loss(run, self.level, "cpu_seconds") for run in self.runs]
        known = [time for time in seconds if not isnan(time)]
        theirs = mean(at_new_loss(run, self.level, "cpu_seconds") for run in base.runs)
        return mean(known) / theirs if known else nan

    @property
    def a_step(self) -> float:
        """Mean processor time of a step, sampling among it, over that of plain finetuning."""
        ours, theirs = (mean(end.cpu_seconds / end.step for end in each.ends) for each in (self, self.plain or self))
        return ours / theirs

    @property
    def memory(self) -> float:
        """What a fit holds over what plain finetuning does."""
        return self.bytes / (self.plain or self).bytes

    def cells(self) -> list[str]:
        """Its line of the table."""
        return [
            self.arm,
            self.setting,
            cell(self.forgotten),
            "" if self.plain is None else cell(self.removed, ".1%"),
            cell([run[-1].new_loss for run in self.runs], ".2f"),
            cell([forgetting(run) for run in self.runs]),
            f"{self.to_level:.2f}",
            f"{self.a_step:.2f}",
            f"{self.memory:.2f}",
        ]


def settings(lab: Lab, level: float) -> dict[str, dict[str, dict[str, Any]]]:
    """By arm and by the name of a setting, what differs from plain finetuning, for the arms that end at the level."""
    rate, width = lab.learning_rate, hidden_size(lab)
    steps = PATIENCE * lab.scale.steps

    def swept(rates: Sequence[float], **changes: Any) -> dict[str, dict[str, Any]]:
        return {
            scientific(each * rate): {"learning_rate": each * rate, "steps": steps, "until": level, **changes}
            for each in rates
        }

    def pulled(pull: str, strengths: Sequence[float]) -> dict[str, dict[str, Any]]:
        return {
            f"× {strength:g}": {"pull": pull, "strength": strength, "steps": steps, "until": level}
            for strength in strengths
        }

    def replayed(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return {"replay": options, "steps": steps, "until": level, **changes}

    kl, next_token = {"loss": "kl", "coefficient": 10.0}, {"loss": "ntp", "coefficient": 1.0}
    slow = {"learning_rate": rate / 10, "steps": 10 * lab.scale.steps, "every": 4 * lab.scale.every, "until": level}
    return {
        "a tenth of the rate": {"": slow},
        "LoRA, rank 4": swept((1.0, 3.0, 10.0), lora_rank=4),
        "LoRA, rank 16": swept((0.3, 1.0, 3.0), lora_rank=16),
        "LoRA, full rank": swept((0.1, 0.3, 1.0), lora_rank=width),
        "LoRA, rank 16, and embeddings": swept((0.1, 0.3, 1.0), lora_rank=16, embeddings=True),
        "lower half frozen": swept((0.3, 1.0, 3.0), freeze=True),
        "OSF": swept((0.1, 0.3, 1.0), osf=0.5),
        "L2-SP": pulled("L2-SP", (0.0001, 0.001, 0.01)),
        "EWC": pulled("EWC", (10.0, 30.0, 100.0)),
        "LwF": {f"× {c:g}": replayed({"loss": "lwf", "coefficient": c}) for c in (0.1, 1.0, 10.0)},
        "next-token replay": {"": replayed(next_token)},
        "next-token replay, other text": {"": replayed(next_token, replayed=lab.other)},
        "KL replay, other text": {"": replayed(kl, replayed=lab.other)},
    }


def whole_runs() -> dict[str, dict[str, Any]]:
    """What differs from plain finetuning, for the arms that take all steps."""
    return {
        PLAIN: {"sweep": SWEEP},
        DEFAULT: {
            "replay": {"loss": "kl", "coefficient": 10.0, "uses_per_sample": "auto"},
            "replay_fraction": 0.1,
        },
        PAPER: {"replay": {"loss": "kl", "coefficient": 10.0}},
        WEAK: {"replay": {"loss": "kl", "coefficient": 1.0}, "sweep": SWEEP},
    }


def hidden_size(lab: Lab) -> int:
    """The width of the model, which is the largest rank of an adapter of its layers."""
    inside = lab.folder / lab.model
    config: Any = AutoConfig.from_pretrained(inside if inside.is_dir() else lab.model)
    return int(config.hidden_size)


def runs_of(lab: Lab, ways: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[list[dict[str, Any]]]:
    """What the runs of some settings gave, a run for each seed."""
    usual = vars(lab.finetuning(0))
    runs = [Alternative(**usual | {"seed": seed} | dict(way)) for way in ways for seed in seeds]
    results = iter(lab.results(runs))
    return [[next(results) for _ in seeds] for _ in ways]


def forgetting_at(result: Mapping[str, Any], level: float) -> tuple[float, float]:
    """To choose among settings: forgetting at a level, and if that is not reached, how far it is away."""
    run = trajectory(result)
    forgotten = forgetting(run, level)
    return (inf, run[-1].new_loss) if isnan(forgotten) else (forgotten, 0.0)


def measure(lab: Lab) -> dict[str, list[Tried]]:
    """Do the runs."""
    whole = whole_runs()
    results = dict(zip(whole, runs_of(lab, list(whole.values()), lab.seeds), strict=True))
    level = max(result["points"][-1]["new_loss"] for name in (DEFAULT, PAPER) for result in results[name])

    first, others = lab.seeds[:1], lab.seeds[1:]
    ways = {(arm, name): way for arm, each in settings(lab, level).items() for name, way in each.items()}
    tried = {key: result for key, (result,) in zip(ways, runs_of(lab, list(ways.values()), first), strict=True)}
    best: dict[str, str] = {}
    for arm, name in sorted(tried, key=lambda key: forgetting_at(tried[key], level)):
        best.setdefault(arm, name)
    chosen = {arm: best[arm] for arm, _ in ways}
    rest = runs_of(lab, [ways[key] for key in chosen.items()], others)
    all_results = {(arm, ""): given for arm, given in results.items()}
    all_results |= {key: [result] for key, result in tried.items()}
    for key, more in zip(chosen.items(), rest, strict=True):
        all_results[key] += more
    points = [
        Tried(
            arm=arm,
            setting=name,
            chosen=chosen.get(arm, name) == name,
            weight=point.get("weight"),
            bytes=result["bytes"],
            seed=seed,
            **{key: value for key, value in point.items() if key != "weight"},
        )
        for (arm, name), given in all_results.items()
        for seed, result in zip(lab.seeds, given, strict=False)
        for point in (*result["points"], *result["sweep"])
    ]
    return {"alternatives": points}


def report(points: Sequence[Tried]) -> Report:
    """Compare the arms, each with its best setting."""
    fits = [point for point in points if point.chosen and point.weight is None]
    runs = runs_by(fits, lambda point: point.arm)
    level = max(run[-1].new_loss for name in (DEFAULT, PAPER) for run in runs[name])
    first = {point.arm: point for point in fits}
    found: dict[str, Found] = {}

    def add(arm: str, curves: Sequence[Trajectory], source: str) -> None:
        ends, about = [run[-1] for run in runs[source]], first[source]
        found[arm] = Found(arm, about.setting, curves, ends, about.bytes, found.get(PLAIN), level)

    for arm, curves in runs.items():
        add(arm, curves, arm)
    swept = [point for point in points if point.weight is not None]
    for arm, curves in runs_by(swept, lambda point: point.arm).items():
        add(f"{arm}{INTERPOLATED}", curves, arm)
    compared = [each for arm, each in found.items() if arm not in (DEFAULT, PAPER, PLAIN)]
    compared.sort(key=lambda each: -mean(-inf if isnan(share) else share for share in each.removed))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 4, sharex=True, sharey=True).flatten()
        for axis, (title, arms) in zip(axes, PANELS.items(), strict=False):
            lines = [
                axis.plot(*curve_of(found[arm].runs), **Look.of(index).line())[0] for index, arm in enumerate(arms)
            ]
            shared = [axis.plot(*curve_of(found[PLAIN].runs), color="0.6", linewidth=1.2, zorder=1)[0]]
            shared.append(axis.axvline(level, color="black", linewidth=0.8, dashes=(3.0, 2.0)))
            # Above the panel, where it hides no curve.
            above = {"loc": "lower left", "bbox_to_anchor": (-0.05, 0.98), "alignment": "left", "handlelength": 1.2}
            axis.legend(lines, arms, title=title, title_fontsize=10, fontsize=8, frameon=False, **above)
        axes[-1].set_axis_off()
        axes[-1].legend(shared, (PLAIN, f"a loss of {level:.2f}"), loc="center left", fontsize=8, frameon=False)
        axes[0].invert_xaxis()
        axes[0].set_yscale("symlog", linthresh=0.02)
        plain_numbers(axes[0].yaxis)
        figure.supxlabel("new-task loss, nats a token: right is learned", fontsize=9)
        figure.supylabel("forgetting, nats a token: down is kept", fontsize=9)

    return Report(
        claim="What would be cheaper",
        experiment=f"{len(found)} ways to finetune, at a new-task loss of {level:.2f}; share of plain finetuning's "
        f"forgetting that is gone there; {count((point.seed for point in points), 'seed')}",
        paper="",
        ours="; ".join(
            f"{each.arm} {cell(each.removed, '.1%')}" for each in (found[DEFAULT], found[PAPER], *compared[:4])
        ),
        details=markdown(
            [
                "arm",
                "best setting",
                f"forgetting at {level:.2f}",
                "removed",
                "new-task loss at the end",
                "forgetting at the end",
                f"time to {level:.2f} ÷ plain",
                "time of a step ÷ plain",
                "memory ÷ plain",
            ],
            [each.cells() for each in found.values()],
        ),
        draw=draw,
        size=(9.5, 6.5),
    )


def curve_of(runs: Sequence[Trajectory]) -> tuple[list[float], list[float]]:
    """New-task losses, falling, and the mean forgetting of some runs when they pass them."""
    ends = [min(point.new_loss for point in run) for run in runs]
    levels = np.linspace(max(run[0].new_loss for run in runs), max(ends), 100)
    forgotten = [[forgetting(run, float(level)) for run in runs] for level in levels]
    known = [
        (float(level), mean(each)) for level, each in zip(levels, forgotten, strict=True) if not np.isnan(each).any()
    ]
    return [level for level, _ in known], [value for _, value in known]


SCRIPT = Script({"alternatives": Tried}, measure, report)

if __name__ == "__main__":
    main([SCRIPT], __doc__)
