"""What would be cheaper than replay: other ways not to forget, at one new-task loss, with their time and memory.

    python examples/paper/alternatives.py --model DIR --prior known.txt --new new.txt \
        --other another.jsonl --other-column question answer

Plain finetuning, a tenth of the rate, LoRA, a frozen lower half, L2-SP, EWC, OSF, learning without forgetting, and
weight interpolation after the fit, beside replay. All are compared at the new-task loss at which KL × 10 ends. Of an
arm with several settings, all are tried with the first seed, and the one that forgets least there goes on to the other
seeds; such runs end when they reach that loss, and have three times the steps. Takes an hour on one core for a model of
650,000 parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from arms import PLAIN
from experiments import Lab, Report, cell, count, main, plain_numbers, table
from learning_rate import scientific
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from peft import LoraConfig, OSFConfig, get_peft_model
from runs import Finetuning, Point, Recorder, Trajectory, at_new_loss, forgetting, train
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_replay import CausalLM, ReplayDataModule, SelfGeneratedReplay, sample_rows
from lightning_replay.callbacks.measuring import measure_set
from lightning_replay.interpolation.weights import set_weights, weights_of
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import evaluating, find_language_model
from lightning_replay.references.models import SavedReference
from lightning_replay.report.plots import Look

DEFAULT, PAPER = "KL replay, default", "KL replay, the paper's"
SWEEP = tuple(step / 20 for step in range(21))
"""Shares of the finetuned weights in an interpolation."""
PATIENCE = 3
"""Times the steps of plain finetuning that an arm may take to the new-task loss."""
FISHER_ROWS = 256
COLUMNS = ("step", "cpu_seconds", "sampled_rows", "new_loss", "prior_loss")
"""Of a point, in the CSV file."""


@dataclass(frozen=True)
class Alternative(Finetuning):
    """A finetuning with something else against forgetting than replay, or with replay.

    Attributes:
        freeze: Whether the embeddings and the lower half of the layers stay as they are. A head that is tied to the
            embeddings then does, too.
        embeddings: Whether the embeddings, and a head that is tied to them, train as a whole beside LoRA's factors.
        osf: The share of singular directions that PEFT's orthogonal subspace finetuning keeps as they are.
        pull: What pulls the weights back to where they began: ``"L2-SP"`` all alike (Li et al. 2018, arXiv 1802.01483),
            ``"EWC"`` each by its Fisher information (Kirkpatrick et al. 2017, arXiv 1612.00796).
        strength: Of the pull.
        sweep: Shares of the finetuned weights at which an interpolation with those before is measured after the fit.
    """

    freeze: bool = False
    embeddings: bool = False
    osf: float | None = None
    pull: Literal["L2-SP", "EWC"] | None = None
    strength: float = 0.0
    sweep: tuple[float, ...] = ()

    kl: ClassVar[bool] = False

    def run(self, folder: Path) -> dict[str, Any]:
        """Train; returns what a finetuning does, the ``bytes`` that it holds, and the points of the ``sweep``."""
        result = super().run(folder)
        for point in result["points"]:
            point |= {"prior_kl": nan, "new_kl": nan}
        result["sweep"] = [result["points"][-1] | point for point in result["sweep"]]
        return result

    def _network(self, model: str) -> Any:
        if not self.freeze and not self.embeddings and self.osf is None:
            return super()._network(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if self.embeddings:
            assert self.lora_rank is not None
            whole = LoraConfig(
                r=self.lora_rank,
                lora_alpha=2 * self.lora_rank,
                target_modules="all-linear",
                modules_to_save=["embed_tokens"],
                ensure_weight_tying=True,
            )
            return get_peft_model(network, whole)
        if self.osf is not None:
            return get_peft_model(network, OSFConfig(effective_rank=self.osf, target_modules="all-linear"))
        layers = network.get_decoder().layers
        for part in (network.get_input_embeddings(), *layers[: len(layers) // 2]):
            part.requires_grad_(False)
        return network

    def _train(
        self, module: CausalLM, data: ReplayDataModule, recorder: Recorder, replay: SelfGeneratedReplay | None
    ) -> dict[str, Any]:
        before = {name: weight.clone() for name, weight in weights_of(module).items()} if self.sweep else {}
        pull = None if self.pull is None else Pull(self.strength, self.length, self.seed, self.pull == "EWC")
        counter = Counter(replay, pull)
        train(module, data, recorder, self.steps, replay, pull, counter)
        after = {name: weight.clone() for name, weight in weights_of(module).items()} if self.sweep else {}
        model, heads, points = find_language_model(module, None), OutputHeads(), []
        sets: Mapping[str, Any] = recorder.prior
        for share in self.sweep:
            set_weights(module, before, after, share)
            found = {name: measure_set(name, rows, model, None, heads, model.device) for name, rows in sets.items()}
            points.append({"weight": share, **{f"{name}_loss": each.loss for name, each in found.items()}})
        return {"bytes": counter.bytes, "sweep": points}


class Pull(Callback):
    r"""Pulls weights back: adds the gradient of a penalty to that of the loss.

    The penalty is :math:`\frac{s}{2} \sum_i F_i (\theta_i - \pi_i)^2`.

    Args:
        strength: The factor s.
        length: Tokens in the samples that the Fisher information is measured on.
        seed: Of these.
        fisher: Whether :math:`F` is the Fisher information of a token, so that the penalty is s times the KL divergence
            from the model before to the second order, if only the diagonal counts; else it is 1.
    """

    def __init__(self, strength: float, length: int, seed: int, fisher: bool) -> None:
        self.strength = strength
        self.length = length
        self.seed = seed
        self.fisher = fisher
        self.first: list[Tensor] = []
        self.importances: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the weights, and measure their importance."""
        if self.first:
            return
        assert isinstance(pl_module, CausalLM)
        self.first = [weight.detach().clone() for weight in pl_module.parameters()]
        if self.fisher:
            model = find_language_model(pl_module, None)
            start: int = pl_module.model.config.bos_token_id  # type: ignore[union-attr, assignment]
            generator = torch.Generator().manual_seed(self.seed)
            with evaluating(pl_module):
                rows = sample_rows(model, [[start]] * FISHER_ROWS, self.length, generator).tokens
            self.importances = fisher_information(pl_module.model, rows)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Add the gradient of the penalty."""
        for index, (weight, first) in enumerate(zip(pl_module.parameters(), self.first, strict=True)):
            assert weight.grad is not None
            away = weight.detach() - first
            weight.grad.add_(away * self.importances[index] if self.fisher else away, alpha=self.strength)


def fisher_information(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """The diagonal of the Fisher information of a token, for each parameter, on samples of the model itself.

    A row's log-likelihood has the gradient of the sum over its tokens, and the expected square of that is the row's
    Fisher information, since the tokens are the model's own; a token's is a share of it.

    Args:
        model: The model.
        rows: Samples of it that begin with a start token, shape ``(rows, length)``.
    """
    weights, tokens = list(model.parameters()), rows.shape[1] - 1
    information = [torch.zeros_like(weight) for weight in weights]
    for row in torch.split(rows, 1):
        loss = model(input_ids=row, labels=row).loss  # the mean over the tokens
        for total, gradient in zip(information, torch.autograd.grad(loss, weights), strict=True):
            total.addcmul_(gradient, gradient, value=tokens / len(rows))
    return information


class Counter(Callback):
    """Counts the bytes that a fit holds from step to step, each tensor once: those of activations are not among them.

    Weights, gradients, the state of the optimizer, the copy that replay compares with, and what a pull keeps.

    Args:
        replay: Of the fit, if any.
        pull: Of the fit, if any.
    """

    def __init__(self, replay: SelfGeneratedReplay | None, pull: Pull | None) -> None:
        self.replay = replay
        self.pull = pull
        self.bytes = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count."""
        held = [*pl_module.parameters(), *pl_module.buffers()]
        for optimizer in trainer.optimizers:
            held += [part for state in optimizer.state.values() for part in state.values() if isinstance(part, Tensor)]
        reference = None if self.replay is None else self.replay.reference.taken
        if isinstance(reference, SavedReference):
            held += reference.state_dict().values()
        if self.pull is not None:
            held += self.pull.first + self.pull.importances
        gradients = sum(weight.nbytes for weight in pl_module.parameters() if weight.requires_grad)
        self.bytes = sum({part.data_ptr(): part.nbytes for part in held}.values()) + gradients


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
        "LoRA, rank 16": swept((1.0, 3.0, 10.0), lora_rank=16),
        "LoRA, full rank": swept((0.3, 1.0, 3.0), lora_rank=width),
        "LoRA, rank 16, and embeddings": swept((0.3, 1.0, 3.0), lora_rank=16, embeddings=True),
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
        "KL replay × 1": {"replay": {"loss": "kl", "coefficient": 1.0}, "sweep": SWEEP},
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


def trajectory(result: Mapping[str, Any]) -> Trajectory:
    """What was measured during a fit."""
    return [Point(**point) for point in result["points"]]


def interpolation(result: Mapping[str, Any]) -> Trajectory:
    """What was measured after a fit at growing shares of its weights."""
    return [Point(**{name: value for name, value in point.items() if name != "weight"}) for point in result["sweep"]]


def forgetting_at(result: Mapping[str, Any], level: float) -> tuple[float, float]:
    """To choose among settings: forgetting at a level, and if that is not reached, how far it is away."""
    run = trajectory(result)
    forgotten = forgetting(run, level)
    return (inf, run[-1].new_loss) if isnan(forgotten) else (forgotten, 0.0)


def alternatives(lab: Lab) -> Report:
    """Do the runs and compare them."""
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
    results |= {arm: [tried[arm, name], *more] for (arm, name), more in zip(chosen.items(), rest, strict=True)}

    found: dict[str, Found] = {}

    def add(arm: str, source: str, curve: Callable[[Mapping[str, Any]], Trajectory]) -> None:
        given = results[source]
        found[arm] = Found(
            arm,
            chosen.get(source, ""),
            [curve(result) for result in given],
            [trajectory(result)[-1] for result in given],
            given[0]["bytes"],
            found.get(PLAIN),
            level,
        )

    for arm in results:
        add(arm, arm, trajectory)
    for arm, way in whole.items():
        if "sweep" in way:
            add(f"{arm}, interpolated", arm, interpolation)
    losers = {arm: each for arm, each in found.items() if arm not in (DEFAULT, PAPER, PLAIN)}
    ranked = sorted(
        losers.values(), key=lambda each: -mean(share if share == share else -inf for share in each.removed)
    )

    def draw(figure: Figure) -> None:
        axis = figure.add_subplot()
        for index, (arm, each) in enumerate(found.items()):
            axis.plot(*curve_of(each.runs), label=arm, **Look.of(index).line())
        axis.axvline(level, color="black", linewidth=0.8, alpha=0.5)
        axis.invert_xaxis()
        axis.set_yscale("symlog", linthresh=0.02)
        plain_numbers(axis.yaxis)
        axis.set(
            title="Right is learned, down is kept",
            xlabel="new-task loss, nats a token",
            ylabel="forgetting, nats a token",
        )
        figure.legend(loc="outside right center", frameon=False, fontsize=7)

    return Report(
        claim="What would be cheaper",
        experiment=f"{len(found)} ways to finetune, at a new-task loss of {level:.2f}; share of plain finetuning's "
        f"forgetting that is gone there; {count(lab.seeds, 'seed')}",
        paper="",
        ours="; ".join(
            f"{each.arm} {cell(each.removed, '.1%')}" for each in (found[DEFAULT], found[PAPER], *ranked[:4])
        ),
        details=table(
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
        rows=[
            {
                "arm": arm,
                "setting": name,
                "chosen": arm not in chosen or chosen[arm] == name,
                "seed": seed,
                "weight": point.get("weight", ""),
                **{key: point[key] for key in COLUMNS},
                "bytes": result["bytes"],
            }
            for (arm, name), given in (
                {(arm, ""): results[arm] for arm in whole}
                | {key: [result] for key, result in tried.items()}
                | {(arm, chosen[arm]): results[arm] for arm in chosen}
            ).items()
            for seed, result in zip(lab.seeds, given, strict=False)
            for point in (*result["points"], *result["sweep"])
        ],
        draw=draw,
        size=(8.5, 5.0),
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


if __name__ == "__main__":
    main({"alternatives": alternatives}, __doc__)
