"""Replay and monitoring beside the callbacks that users have in their Trainers already."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from transformers import LlamaForCausalLM

from lightning_replay import Copy, ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
from lightning_replay.models.language_model import find_language_model
from tests.helpers.by_hand import ByHand, weights
from tests.helpers.modules import DrawnRows, PlainDescent, Rows, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]


class Data(L.LightningDataModule):
    """Keeps its batch size in an attribute."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return mapping_loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return mapping_loader(8)


class DataWithHyperparameters(L.LightningDataModule):
    """Keeps its batch size with its hyper-parameters."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return mapping_loader(batch_size=self.hparams["batch_size"])


def replay_of(**options: Any) -> SelfGeneratedReplay:
    defaults: dict[str, Any] = {"coefficient": 2.0, "refill_rows": 8, "seed": 3, "sampling": Sampling(length=12)}
    return SelfGeneratedReplay(**defaults | options)


def monitor_of() -> ForgettingMonitor:
    return ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=2)


def figures(trainer: L.Trainer) -> dict[str, float]:
    """What was measured last; of times, no two are the same."""
    return {key: float(value) for key, value in trainer.callback_metrics.items() if not key.endswith("seconds")}


FINDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "copy": ({}, {}),
    "copy beside": ({"reference": Copy(save="beside")}, {}),
    "cached": ({"reference": "cached"}, {}),
    "average": ({"reference": "ema"}, {}),
    "real rows": ({}, {"prior": Rows(16, seed=5).tokens}),
}


def search(kind: type[LearningRateFinder]) -> LearningRateFinder:
    return kind(num_training_steps=16, min_lr=1e-4, max_lr=0.1)


@pytest.mark.parametrize(("name", "first"), [*((name, False) for name in FINDERS), ("copy", True)])
def test_once_a_learning_rate_was_found_the_run_is_that_of_one_begun_with_it(
    tiny_llama: Make, tmp_path: Path, name: str, first: bool
) -> None:
    (options, of_data), rate, ends = FINDERS[name], 0.5, []
    for finders in ([search(LearningRateFinder)], []):
        module, drawn = PlainDescent(tiny_llama(), rate), DrawnRows()
        ours: list[Any] = [replay_of(**options), monitor_of(), drawn]
        trainer = quiet_trainer(callbacks=[*finders, *ours] if first else [*ours, *finders], default_root_dir=tmp_path)
        trainer.fit(module, datamodule=ReplayDataModule(Data(8), 0.2, **of_data))
        ends.append((weights(module.model), torch.cat(drawn.rows), figures(trainer)))
        rate = module.learning_rate
    assert rate != 0.5
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]


@pytest.mark.parametrize("average", [StochasticWeightAveraging(0.1, swa_epoch_start=1), WeightAveraging()])
def test_averaged_weights_are_measured_at_the_end(tiny_llama: Make, average: Callback) -> None:
    monitor = ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=4)
    module = PlainDescent(tiny_llama())
    trainer = quiet_trainer(callbacks=[average, monitor], max_steps=-1, max_epochs=3)
    trainer.fit(module, mapping_loader(32))
    assert trainer.global_step == 12
    again = ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=0)
    quiet_trainer(callbacks=[again], max_steps=1).fit(PlainDescent(module.model), mapping_loader(8))
    assert again.baseline["prior"] == pytest.approx(float(trainer.callback_metrics["prior_loss/prior"]), rel=1e-6)


def test_a_second_fit_with_a_finder_takes_its_reference_and_its_baseline_anew(tiny_llama: Make, tmp_path: Path) -> None:
    module, replay, monitor = PlainDescent(tiny_llama()), replay_of(), monitor_of()
    trainer = quiet_trainer(callbacks=[replay, monitor, search(LearningRateFinder)], default_root_dir=tmp_path)
    data = ReplayDataModule(Data(8), 0.2)
    trainer.fit(module, datamodule=data)
    between, measured = weights(module.model).clone(), figures(trainer)["prior_loss/prior"]
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(module, datamodule=data)
    with replay.reference.get(trainer, find_language_model(module, None)).active() as reference:
        assert torch.equal(weights(reference.module), between)
    assert monitor.baseline["prior"] == pytest.approx(measured)
    assert not torch.equal(weights(module.model), between)


def test_a_resumed_run_with_a_finder_keeps_the_reference_and_the_baseline(tiny_llama: Make, tmp_path: Path) -> None:
    first = quiet_trainer(callbacks=[replay_of(), monitor := monitor_of()], max_steps=3)
    first.fit(PlainDescent(tiny_llama()), datamodule=ReplayDataModule(Data(8), 0.2))
    first.save_checkpoint(tmp_path / "three.ckpt")
    module, replay, resumed = PlainDescent(tiny_llama(seed=1)), replay_of(), monitor_of()
    trainer = quiet_trainer(callbacks=[replay, resumed, search(LearningRateFinder)], default_root_dir=tmp_path)
    trainer.fit(module, datamodule=ReplayDataModule(Data(8), 0.2), ckpt_path=tmp_path / "three.ckpt")
    assert trainer.global_step == 6
    with replay.reference.get(trainer, find_language_model(module, None)).active() as reference:
        assert torch.equal(weights(reference.module), weights(tiny_llama()))
    assert resumed.baseline == monitor.baseline


def test_a_finder_between_epochs_leaves_replay_as_it_was(tiny_llama: Make, tmp_path: Path) -> None:
    class Later(LearningRateFinder):
        """As Lightning's documentation has it, for a model that has been trained already."""

        def on_fit_start(self, *args: Any) -> None:
            return

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    class Known(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups[0]["lr"] = found

    found, ends = 0.0, []
    for kind in (search(Later), Known()):
        module, drawn = PlainDescent(tiny_llama(), 0.05), DrawnRows()
        trainer = quiet_trainer(
            callbacks=[replay_of(), monitor_of(), drawn, kind],
            default_root_dir=tmp_path,
            max_steps=-1,
            max_epochs=2,
            limit_train_batches=5,
        )
        trainer.fit(module, datamodule=ReplayDataModule(Data(8), 0.2))
        assert trainer.global_step == 10
        ends.append((weights(module.model), torch.cat(drawn.rows), figures(trainer)))
        found = module.learning_rate
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]


@pytest.mark.parametrize("kind", [Data, DataWithHyperparameters])
def test_once_batch_size_and_rate_were_found_the_run_is_that_of_one_begun_with_them(
    tiny_llama: Make, tmp_path: Path, kind: Callable[[int], L.LightningDataModule]
) -> None:
    size, rate, ends = 2, 0.5, []
    for finders in ([BatchSizeFinder(init_val=4, max_trials=2), search(LearningRateFinder)], []):
        module, drawn, data = PlainDescent(tiny_llama(), rate), DrawnRows(), ReplayDataModule(kind(size), 0.2)
        trainer = quiet_trainer(callbacks=[replay_of(), monitor_of(), drawn, *finders], default_root_dir=tmp_path)
        trainer.fit(module, datamodule=data)
        ends.append((weights(module.model), torch.cat(drawn.rows), figures(trainer)))
        size, rate = len(module.batches[-1]["input_ids"]), module.learning_rate
    assert size == 8
    assert rate != 0.5
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]


def test_monitors_of_rates_and_devices_log_beside_replay_and_change_nothing(tiny_llama: Make, tmp_path: Path) -> None:
    ends, logger = [], CSVLogger(tmp_path)
    for monitors in ([LearningRateMonitor("step"), DeviceStatsMonitor(cpu_stats=True)], []):
        module = PlainDescent(tiny_llama(), 0.05)
        trainer = quiet_trainer(
            callbacks=[*monitors, replay_of(), monitor_of()],
            logger=logger if monitors else False,
            log_every_n_steps=2,
        )
        trainer.fit(module, datamodule=ReplayDataModule(Data(8), 0.2))
        ends.append(weights(module.model))
    assert torch.equal(*ends)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = {key: [int(row["step"]) for row in rows if row[key]] for key in rows[0]}
    stats = next(key for key in steps if key.startswith("DeviceStatsMonitor.on_train_batch_end"))
    assert steps["lr-SGD"] == steps["replay/loss"] == steps[stats] == [1, 3, 5]
    assert {row["lr-SGD"] for row in rows if row["lr-SGD"]} == {"0.05"}


PHASES = [
    ["model.lm_head"],
    ["model.model.layers.1"],
    ["model.model.embed_tokens", "model.model.layers.0", "model.model.norm"],
]


class WithValidation(PlainDescent):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class ByHandInPhases(ByHand):
    """Unfreezes by hand what is due in each epoch."""

    def on_train_epoch_start(self) -> None:
        due = tuple(name for phase in PHASES[: self.current_epoch + 1] for name in phase)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(due))


@pytest.mark.integration
@pytest.mark.parametrize("restore_best", [False, True])
def test_a_finetuning_schedule_unfreezes_as_by_hand_and_replay_goes_on(
    tiny_llama: Make, tmp_path: Path, restore_best: bool
) -> None:
    package = pytest.importorskip("finetuning_scheduler", reason="pip install finetuning-scheduler")
    schedule = {
        phase: {"params": [f"{name}.*" for name in names], "max_transition_epoch": phase + 1, "lr": 0.02}
        for phase, names in enumerate(PHASES)
    }
    (tmp_path / "schedule.yaml").write_text(yaml.safe_dump(schedule))

    class Frozen(Callback):
        """Keeps which parameters are as they were, at the end of each epoch."""

        def __init__(self) -> None:
            self.names: list[set[str]] = []

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before = dict(start.named_parameters())
            now = pl_module.named_parameters()
            self.names.append({name for name, value in now if torch.equal(value, before[name])})

    start, ours, frozen = PlainDescent(tiny_llama()), WithValidation(tiny_llama(), 0.02), Frozen()
    replay, drawn = replay_of(), DrawnRows()
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 3}
    trainer = quiet_trainer(
        callbacks=[
            replay,
            monitor_of(),
            drawn,
            frozen,
            package.FinetuningScheduler(
                ft_schedule=tmp_path / "schedule.yaml", epoch_transitions_only=True, restore_best=restore_best
            ),
            package.FTSCheckpoint(dirpath=tmp_path, monitor="val_loss", save_top_k=3),
        ],
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(ours, datamodule=ReplayDataModule(Data(8), 0.2))

    parameters = {name for name, _ in ours.named_parameters()}
    for epoch, names in enumerate(frozen.names):
        waiting = tuple(name for phase in PHASES[epoch + 1 :] for name in phase)
        assert names == {name for name in parameters if waiting and name.startswith(waiting)}
    with replay.reference.get(trainer, find_language_model(ours, None)).active() as reference:
        assert torch.equal(weights(reference.module), weights(tiny_llama()))
    assert len(torch.cat(drawn.rows)) == 18  # 2 rows in each of 9 steps
    by_hand = {}
    for coefficient in (0.0, 2.0):
        model = tiny_llama()
        module = ByHandInPhases(model, tiny_llama(), drawn.rows, "kl", coefficient)
        module.learning_rate = 0.02
        quiet_trainer(**options).fit(module, mapping_loader())
        by_hand[coefficient] = weights(model)
    effect = float((by_hand[2.0] - by_hand[0.0]).abs().max())
    assert effect > 1e-4
    assert float((weights(ours.model) - by_hand[2.0]).abs().max()) < 0.02 * effect
