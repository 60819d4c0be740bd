"""Ways to finetune one model on one text, and how they are compared at the same new-task loss."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Literal, TypeVar

import numpy as np
from experiments import Lab
from reports import cell
from runs import Finetuning, Point, Trajectory, forgetting

from lightning_replay import KL, Sampling
from lightning_replay.utilities.tables import markdown

PLAIN = "plain finetuning"


@dataclass(frozen=True)
class Arm:
    """One way to finetune.

    Attributes:
        replay: Arguments of ``SelfGeneratedReplay``; None for no replay.
        text: Whose the replay rows are: the model's own samples, prior text, or text of another kind.
        from_start: Whether each sample is one row, which begins with the start token, instead of two.
        changes: What else differs from plain finetuning.
        slowness: What the learning rate is divided by.
    """

    replay: dict[str, Any] | None = None
    text: Literal["own", "prior", "other"] = "own"
    from_start: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    slowness: float = 1.0

    def run(self, lab: Lab, seed: int) -> Finetuning:
        """The run of this arm with a seed."""
        replayed = {"own": None, "prior": lab.prior, "other": lab.other}[self.text]
        rate = lab.learning_rate / self.slowness
        replay = self.replay
        if replay is not None and self.from_start:
            replay = {**replay, "sampling": Sampling(length=lab.scale.length)}
        return lab.finetuning(seed, learning_rate=rate, replay=replay, replayed=replayed, **self.changes)


def _kl(coefficient: float, **options: Any) -> dict[str, Any]:
    return {"loss": "kl", "coefficient": coefficient, **options}


def _next_token(coefficient: float, **options: Any) -> dict[str, Any]:
    return {"loss": "ntp", "coefficient": coefficient, **options}


KL_COEFFICIENTS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
NEXT_TOKEN_COEFFICIENTS = (0.1, 1.0, 10.0)

ARMS: dict[str, Arm] = {
    PLAIN: Arm(),
    "learning rate ÷ 10": Arm(slowness=10.0),
    "LoRA, rank 16": Arm(changes={"lora_rank": 16}),
    **{f"KL × {coefficient:g}": Arm(_kl(coefficient)) for coefficient in KL_COEFFICIENTS},
    **{f"next-token × {coefficient:g}": Arm(_next_token(coefficient)) for coefficient in NEXT_TOKEN_COEFFICIENTS},
    "KL × 10, real rows": Arm(_kl(10.0), "prior"),
    "next-token × 1, real rows": Arm(_next_token(1.0), "prior"),
    "KL × 10, other text": Arm(_kl(10.0), "other"),
    "next-token × 1, other text": Arm(_next_token(1.0), "other"),
    "KL on new rows × 1": Arm({"loss": "lwf", "coefficient": 1.0}),
    "KL on new rows × 0.1": Arm({"loss": "lwf", "coefficient": 0.1}),
    "next-token × 3": Arm(_next_token(3.0)),
    "mixed": Arm({"loss": "mixed"}),
    "reverse KL × 10": Arm(_kl(10.0, loss=KL(direction="reverse"))),
    "Jensen–Shannon × 40": Arm(_kl(40.0, loss=KL(direction="jensen_shannon"))),
    "KL × 10, cached, k = 64": Arm(_kl(10.0, reference="cached")),
    "KL × 10, rows from the start token": Arm(_kl(10.0), from_start=True),
    "KL × 10, documents stop and are packed": Arm(_kl(10.0, sampling=Sampling(stop_at_eos=True))),
    "KL × 10, live rows": Arm(_kl(10.0, source="live")),
    "next-token × 1, live rows": Arm(_next_token(1.0, source="live")),
    "KL × 10, moving average": Arm(_kl(10.0, reference="ema")),
}

Trajectories = dict[str, list[Trajectory]]


@dataclass(frozen=True, kw_only=True)
class SeedPoint(Point):
    """A measured point in a CSV file; its dataclass says which run it is of.

    Attributes:
        seed: Of the run.
    """

    seed: int


@dataclass(frozen=True, kw_only=True)
class ArmPoint(SeedPoint):
    """A measured point of an arm.

    Attributes:
        arm: Its name.
    """

    arm: str


Measured = TypeVar("Measured", bound=SeedPoint)
Key = TypeVar("Key", bound=Hashable)


def runs_by(points: Iterable[Measured], key: Callable[[Measured], Key]) -> dict[Key, list[Trajectory]]:
    """The runs that some points are of, a run for each seed, by what they have in common."""
    found: dict[Key, dict[int, Trajectory]] = {}
    for point in points:
        found.setdefault(key(point), {}).setdefault(point.seed, []).append(point)
    return {name: list(runs.values()) for name, runs in found.items()}


def runs_by_arm(points: Iterable[ArmPoint]) -> Trajectories:
    """The runs of each arm."""
    return runs_by(points, lambda point: point.arm)


def trajectories(lab: Lab, names: Sequence[str]) -> Trajectories:
    """What was measured in the runs of some arms, a run for each seed."""
    runs = [ARMS[name].run(lab, seed) for seed in lab.seeds for name in names]
    measured = lab.trajectories(runs)
    return {name: measured[index :: len(names)] for index, name in enumerate(names)}


def removed(arm: Sequence[Trajectory], plain: Sequence[Trajectory]) -> list[float]:
    """For each seed, the share of plain finetuning's forgetting that is gone, at the lowest new-task loss of both."""
    return [1 - ours / theirs for ours, theirs in at_one_loss(arm, plain)]


def difference(arm: Sequence[Trajectory], other: Sequence[Trajectory]) -> list[float]:
    """For each seed, how much more an arm has forgotten than another, at the lowest new-task loss of both."""
    return [ours - theirs for ours, theirs in at_one_loss(arm, other)]


def at_one_loss(arm: Sequence[Trajectory], other: Sequence[Trajectory]) -> list[tuple[float, float]]:
    """For each seed, the forgetting of two arms at the lowest new-task loss that both reach."""
    pairs = []
    for ours, theirs in zip(arm, other, strict=True):
        level = max(min(point.new_loss for point in run) for run in (ours, theirs))
        pairs.append((forgetting(ours, level), forgetting(theirs, level)))
    return pairs


def comparison(arms: Trajectories) -> str:
    """The table of some arms, plain finetuning among them."""
    plain = arms[PLAIN]
    rows = []
    for name, runs in arms.items():
        without = [theirs for _, theirs in at_one_loss(runs, plain)]
        rows.append(
            [
                name,
                cell([run[-1].new_loss for run in runs], ".2f"),
                cell([forgetting(run) for run in runs]),
                cell(without, "+.2f"),
                "" if name == PLAIN else cell(removed(runs, plain), ".1%"),
            ]
        )
    return markdown(["arm", "new-task loss", "forgetting", "plain finetuning's there", "removed"], rows)


def arm_points(lab: Lab, names: Sequence[str]) -> list[ArmPoint]:
    """What was measured in the runs of some arms, for a CSV file."""
    return [
        ArmPoint(arm=name, seed=seed, **vars(point))
        for name, runs in trajectories(lab, names).items()
        for seed, run in zip(lab.seeds, runs, strict=True)
        for point in run
    ]


def average(runs: Sequence[Trajectory], name: str) -> list[float]:
    """The mean over the seeds of what was measured at each point, for runs of the same steps."""
    return [mean(getattr(point, name) for point in points) for points in zip(*runs, strict=True)]


def loss_after(run: Trajectory, step: float) -> float:
    """The new-task loss after a number of steps, between two measurements by linear interpolation."""
    return float(np.interp(step, [point.step for point in run], [point.new_loss for point in run]))


def plain_level(lab: Lab, share: float) -> float:
    """The new-task loss at which plain finetuning is, in the mean of the seeds, after a share of its steps."""
    return mean(loss_after(run, lab.scale.steps * share) for run in trajectories(lab, [PLAIN])[PLAIN])
