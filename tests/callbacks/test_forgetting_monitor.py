import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM

from lightning_replay import ForgettingMonitor, ReplayDataModule, SelfGeneratedReplay, forward_kl
from tests.helpers.modules import (
    HandWritten,
    PairModule,
    TokensModule,
    UserModule,
    mapping_loader,
    pair_loader,
    quiet_trainer,
    tensor_loader,
)

Make = Callable[..., LlamaForCausalLM]


@torch.no_grad()
def by_hand(model: LlamaForCausalLM, before: LlamaForCausalLM) -> dict[str, float]:
    """Loss, accuracy and KL on the prior rows, one row at a time."""
    losses, right, drift = [], [], []
    for row in torch.cat([batch["input_ids"] for batch in prior()]):
        logits, reference = model.eval()(row[None]).logits[0], before.eval()(row[None]).logits[0]
        losses += F.cross_entropy(logits[:-1], row[1:], reduction="none").tolist()
        right += (logits[:-1].argmax(-1) == row[1:]).tolist()
        drift += forward_kl(logits[None, :-1], reference[None, :-1], reduction="none")[0].tolist()
    return {name: sum(values) / len(values) for name, values in {"loss": losses, "right": right, "kl": drift}.items()}


def prior() -> Any:
    return mapping_loader(20, batch_size=8)


def test_values_equal_a_calculation_row_by_row(tiny_llama: Make) -> None:
    model, before = tiny_llama(), tiny_llama()
    trainer = quiet_trainer(max_steps=4, callbacks=[monitor := ForgettingMonitor({"rows": prior()})])
    trainer.fit(UserModule(model), mapping_loader())
    start, end, seen = by_hand(before, before), by_hand(model, before), trainer.callback_metrics
    assert monitor.baseline["rows"] == pytest.approx(start["loss"], rel=1e-5)
    assert float(seen["prior_loss/rows"]) == pytest.approx(end["loss"], rel=1e-5)
    assert float(seen["forgetting/rows"]) == pytest.approx(end["loss"] - start["loss"], rel=1e-4)
    assert float(seen["prior_perplexity/rows"]) == pytest.approx(math.exp(end["loss"]), rel=1e-5)
    assert float(seen["prior_accuracy/rows"]) == pytest.approx(end["right"])
    assert float(seen["prior_kl/rows"]) == pytest.approx(end["kl"], rel=1e-4)


def test_each_value_stands_on_its_step_in_every_logger(tiny_llama: Make, tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, version="csv"), TensorBoardLogger(tmp_path, version="tensorboard")]
    trainer = quiet_trainer(
        max_steps=10,
        logger=loggers,
        log_every_n_steps=3,
        accumulate_grad_batches=2,
        max_epochs=-1,
        callbacks=[ForgettingMonitor({"rows": prior()}, every_n_steps=4)],
    )
    trainer.fit(UserModule(tiny_llama()), mapping_loader())
    with open(tmp_path / "lightning_logs" / "csv" / "metrics.csv") as file:
        rows = {int(row["step"]): row["forgetting/rows"] for row in csv.DictReader(file) if row["forgetting/rows"]}
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "tensorboard")).Reload().Scalars("forgetting/rows")
    assert list(rows) == [event.step for event in events] == [0, 4, 8, 10]
    assert [float(value) for value in rows.values()] == pytest.approx([event.value for event in events], rel=1e-6)
    assert float(rows[0]) == 0
    assert float(trainer.callback_metrics["forgetting/rows"]) == pytest.approx(float(rows[10]))


def test_checkpoints_and_early_stopping_can_watch_it(tiny_llama: Make, tmp_path: Path) -> None:
    key = "forgetting/rows"
    # The random weights are so bad that training on anything makes them better: forgetting falls below zero.
    stop = EarlyStopping(key, stopping_threshold=-0.01, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path, monitor=key, every_n_train_steps=8)
    trainer = quiet_trainer(
        max_steps=200,
        enable_checkpointing=True,
        callbacks=[ForgettingMonitor({"rows": prior()}, every_n_steps=4), stop, best],
    )
    trainer.fit(UserModule(tiny_llama()), mapping_loader())
    assert trainer.global_step == 8  # the end of the first epoch
    assert best.best_model_score is not None
    assert float(best.best_model_score) == float(trainer.callback_metrics[key]) < -0.01


def test_pairs_and_bare_tensors_are_measured_alike() -> None:
    values = []
    for kind, train, held_out in (
        (PairModule, pair_loader(), pair_loader(16)),
        (TokensModule, tensor_loader(), tensor_loader(16, length=13)),
    ):
        torch.manual_seed(0)
        module = kind(HandWritten())
        quiet_trainer(max_steps=1, callbacks=[monitor := ForgettingMonitor({"rows": held_out})]).fit(module, train)
        values.append(monitor.baseline["rows"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_monitoring_changes_nothing_in_the_run(tiny_llama: Make) -> None:
    class RandomStates(Callback):
        def __init__(self) -> None:
            self.states: list[torch.Tensor] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.states.append(torch.get_rng_state())

    weights, states = [], []
    for monitors in ([], [ForgettingMonitor({"rows": mapping_loader(shuffle=True)}, every_n_steps=1)]):
        L.seed_everything(0)
        model, recorder = tiny_llama(attention_dropout=0.2), RandomStates()
        model.model.layers[1].eval()
        trainer = quiet_trainer(callbacks=[*monitors, recorder])
        trainer.fit(UserModule(model), mapping_loader(shuffle=True))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        states.append(torch.stack(recorder.states))
        assert (model.model.layers[0].training, model.model.layers[1].training) == (True, False)
    assert torch.equal(*weights)
    assert torch.equal(*states)


def test_two_monitors_and_a_replay_callback_share_one_reference(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay(refill_rows=16)
    monitors = [ForgettingMonitor({"a": prior()}), ForgettingMonitor({"b": prior()})]
    trainer = quiet_trainer(callbacks=[monitors[0], replay, monitors[1]])
    trainer.fit(UserModule(tiny_llama()), datamodule=ReplayDataModule(mapping_loader(), 0.2))
    a, b = (float(trainer.callback_metrics[f"prior_kl/{name}"]) for name in "ab")
    assert a == b > 0
    assert all(monitor._own_reference.taken is None for monitor in monitors)


def test_resuming_keeps_the_baseline_and_the_reference(tiny_llama: Make, tmp_path: Path) -> None:
    def run(steps: int, checkpoint: Path | None = None) -> L.Trainer:
        monitor = ForgettingMonitor({"rows": prior()}, every_n_steps=2)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = quiet_trainer(max_steps=steps, enable_checkpointing=True, callbacks=[monitor, saver])
        trainer.fit(UserModule(tiny_llama()), mapping_loader(32), ckpt_path=checkpoint)
        return trainer

    straight = run(8)
    resumed = run(8, tmp_path / "step=4.ckpt")
    for key in ("forgetting/rows", "prior_loss/rows", "prior_kl/rows"):
        assert float(resumed.callback_metrics[key]) == float(straight.callback_metrics[key]) != 0


def test_a_resumed_run_without_a_saved_reference_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="plain", every_n_train_steps=2)
    plain = quiet_trainer(max_steps=2, enable_checkpointing=True, callbacks=[saver])
    plain.fit(UserModule(tiny_llama()), mapping_loader())
    trainer = quiet_trainer(max_steps=4, callbacks=[ForgettingMonitor({"rows": prior()})])
    with pytest.raises(MisconfigurationException, match="holds no reference model"):
        trainer.fit(UserModule(tiny_llama()), mapping_loader(), ckpt_path=tmp_path / "plain.ckpt")


def test_bad_prior_sets_are_refused_before_the_first_step(tiny_llama: Make) -> None:
    with pytest.raises(ValueError, match="at least one held-out set"):
        ForgettingMonitor({})
    with pytest.raises(ValueError, match="Two prior sets have one name"):
        ForgettingMonitor([("a", prior()), ("a", prior())])
    with pytest.raises(ValueError, match="can't be named 'seconds'"):
        ForgettingMonitor({"seconds": prior()})
    with pytest.raises(ValueError, match="`every_n_steps`"):
        ForgettingMonitor({"a": prior()}, every_n_steps=-1)
    for callbacks, message in (
        ([ForgettingMonitor({"empty": []})], "'empty' gave no batch"),
        (
            [ForgettingMonitor({"a": prior()}), ForgettingMonitor({"b": prior(), "a": prior()})],
            r"same name: \['a'\]",
        ),
    ):
        module = UserModule(tiny_llama())
        with pytest.raises(MisconfigurationException, match=message):
            quiet_trainer(callbacks=callbacks).fit(module, mapping_loader())
        assert not module.batches
