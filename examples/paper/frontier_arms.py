"""What `frontier.py` compares: ways to spend replay rows, and texts to finetune on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from arms import PLAIN, Arm
from experiments import Lab
from reports import count
from runs import Finetuning

from lightning_replay import KL, Copy

FRACTIONS, USES = (0.2, 0.1, 0.05), (1, 4, 16)


def spent(fraction: float, uses: int | Literal["auto"], coefficient: float = 10.0, **options: Any) -> Arm:
    """Replay of a share of rows, each used so often."""
    replay = {"loss": "kl", "coefficient": coefficient, "uses_per_sample": uses, **options}
    return Arm(replay, changes={"replay_fraction": fraction})


def all_arms(length: int) -> dict[str, Arm]:
    """What is compared, for new rows of a length; a name is the share of rows, their uses, and what else is changed."""
    return {
        PLAIN: Arm(),
        **{
            f"{fraction:g}, {count(range(uses), 'use')}": spent(fraction, uses)
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
