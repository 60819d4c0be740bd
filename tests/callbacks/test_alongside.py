"""Replay and monitoring beside everything else that a Trainer does; each test asserts a figure or an equality."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM

from lightning_replay import ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
from tests.helpers.by_hand import ByHand, weights
from tests.helpers.modules import DrawnRows, PlainDescent, Rows, UserModule, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]
Configure = Callable[[nn.Module], nn.Module]
RATE = 0.02


def replay_of(loss: Any = "kl", **options: Any) -> SelfGeneratedReplay:
    defaults: dict[str, Any] = {"coefficient": 2.0, "refill_rows": 8, "seed": 3, "sampling": Sampling(length=12)}
    return SelfGeneratedReplay(loss, **defaults | options)


def monitor_of(**options: Any) -> ForgettingMonitor:
    return ForgettingMonitor({"prior": mapping_loader(8)}, **{"every_n_steps": 2} | options)


def compiled(backend: str) -> Configure:
    def compile_(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        wrapped: Any = torch.compile(model, backend=backend)
        return wrapped  # type: ignore[no-any-return]

    return compile_


def checkpointing(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable()
    model.train()
    return model  # type: ignore[no-any-return]


def as_it_is(model: nn.Module) -> nn.Module:
    return model


TRAINERS: dict[str, tuple[dict[str, Any], Callable[[], list[Any]], Configure]] = {
    "accumulation": ({"accumulate_grad_batches": 3}, list, as_it_is),
    "accumulation schedule": ({"max_steps": 5}, lambda: [GradientAccumulationScheduler({0: 1, 1: 2})], as_it_is),
    "clipping by norm": ({"gradient_clip_val": 0.1}, list, as_it_is),
    "clipping by value": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, list, as_it_is),
    "gradient checkpointing": ({}, list, checkpointing),
    "compiled, eager": ({}, list, compiled("eager")),
    "compiled, aot_eager": ({}, list, compiled("aot_eager")),
    "half of the batches": ({"limit_train_batches": 0.5, "max_steps": -1, "max_epochs": 2}, list, as_it_is),
    "some batches": ({"limit_train_batches": 3, "max_steps": -1, "max_epochs": 2}, list, as_it_is),
    "the same batches": ({"overfit_batches": 2, "max_steps": -1, "max_epochs": 3}, list, as_it_is),
    "fast run": ({"fast_dev_run": 2}, list, as_it_is),
    "stochastic weight averaging": (
        {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 2},
        lambda: [StochasticWeightAveraging(RATE, swa_epoch_start=1)],
        as_it_is,
    ),
    "EMA weight averaging": ({}, lambda: [EMAWeightAveraging(decay=0.5)], as_it_is),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_training_equals_a_loss_written_by_hand_under(tiny_llama: Make, name: str) -> None:
    """The same final weights, with monitoring on the one side and none on the other."""
    options, callbacks, configure = TRAINERS[name]
    ours, drawn = tiny_llama(), DrawnRows()
    trainer = quiet_trainer(callbacks=[replay_of(coefficient=10.0), drawn, monitor_of(), *callbacks()], **options)
    trainer.fit(PlainDescent(configure(ours), RATE), datamodule=ReplayDataModule(mapping_loader(), 0.2))
    assert torch.cat(drawn.rows).shape == (2 * len(drawn.rows), 12)
    by_hand = {}
    for coefficient in (0.0, 10.0):
        model = tiny_llama()
        module = ByHand(configure(model), tiny_llama(), drawn.rows, "kl", coefficient)
        module.learning_rate = RATE
        plain = quiet_trainer(callbacks=callbacks(), **options)
        plain.fit(module, mapping_loader())
        assert (trainer.global_step, len(drawn.rows)) == (plain.global_step, len(module.batches))
        by_hand[coefficient] = weights(model)
    effect = float((by_hand[10.0] - by_hand[0.0]).abs().max())
    assert effect > 1e-4
    # The same but for rounding, which steps make larger.
    assert float((weights(ours) - by_hand[10.0]).abs().max()) < 0.02 * effect


def test_in_16_bits_the_replay_loss_is_the_one_by_hand(tiny_llama: Make) -> None:
    # Two steps: after six, weights that begin 1e-6 apart end as far apart as they have moved.
    options: dict[str, Any] = {"precision": "bf16-mixed", "max_steps": 2}
    ours, theirs, drawn = PlainDescent(tiny_llama()), tiny_llama(), DrawnRows()
    trainer = quiet_trainer(callbacks=[replay_of(), drawn, monitor_of()], **options)
    trainer.fit(ours, datamodule=ReplayDataModule(mapping_loader(), 0.2))
    by_hand = ByHand(theirs, tiny_llama(), drawn.rows, "kl", 2.0)
    quiet_trainer(**options).fit(by_hand, mapping_loader())
    moved = float((weights(theirs) - weights(tiny_llama())).abs().max())
    assert float((weights(ours.model) - weights(theirs)).abs().max()) < 0.02 * moved
    assert all(parameter.dtype == torch.float32 for parameter in ours.model.parameters())


@pytest.mark.long
def test_under_the_inductor_the_loss_falls_as_it_does_without(tiny_llama: Make) -> None:
    seen = []
    for configure in (as_it_is, compiled("inductor")):
        model = tiny_llama()
        trainer = quiet_trainer(callbacks=[replay_of(), monitor_of(every_n_steps=0)], max_steps=3)
        trainer.fit(PlainDescent(configure(model)), datamodule=ReplayDataModule(mapping_loader(), 0.2))
        seen.append((weights(model), float(trainer.callback_metrics["replay/loss"])))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-3)


def test_sampling_does_not_compile_a_compiled_module_anew(tiny_llama: Make) -> None:
    counts = []
    for fraction in (0.0, 0.2):
        graphs: list[Any] = []

        def count(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        module = UserModule(torch.compile(tiny_llama(), backend=count, dynamic=False))  # type: ignore[arg-type]
        replay = replay_of("ntp", source="live", sampling=Sampling(length=24))
        quiet_trainer(callbacks=[replay], max_steps=2).fit(
            module, datamodule=ReplayDataModule(mapping_loader(), fraction)
        )
        counts.append(len(graphs))
    # For new rows; then also for two tokens at once and one by one, to see what the model is, and for replay rows.
    assert 1 == counts[0] < counts[1] <= 6


def test_samples_are_the_same_with_gradient_checkpointing_and_the_cache_is_still_used(tiny_llama: Make) -> None:
    class Calls(L.Callback):
        """Counts the positions that the model is asked for before the first step."""

        def __init__(self) -> None:
            self.positions = 0

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.handle = pl_module.model.register_forward_pre_hook(self._count, with_kwargs=True)

        def on_train_batch_start(self, *args: Any) -> None:
            self.handle.remove()

        def _count(self, module: Any, args: Any, kwargs: Any) -> None:
            assert not module.training
            self.positions += args[0].shape[1]

    seen = []
    for configure in (as_it_is, checkpointing):
        calls, drawn = Calls(), DrawnRows()
        model: Any = configure(tiny_llama())
        trainer = quiet_trainer(callbacks=[replay_of("ntp", source="live"), calls, drawn], max_steps=1)
        trainer.fit(UserModule(model), datamodule=ReplayDataModule(mapping_loader(), 0.2))
        assert model.is_gradient_checkpointing == (configure is checkpointing)
        assert model.config.use_cache
        assert model.training
        seen.append((calls.positions, drawn.rows[0]))
    # One position to see what a state takes, and one for each token drawn after the first; not 1 + 2 + ... + 11.
    assert seen[0][0] == seen[1][0] == 1 + 11
    assert torch.equal(seen[0][1], seen[1][1])


def test_a_loader_without_a_length_replays_as_one_with_a_length_does(tiny_llama: Make) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            rows = Rows(64)
            return (rows[index] for index in range(64))

    seen = []
    for loader in (mapping_loader(), DataLoader(Stream(), batch_size=8)):
        module = UserModule(tiny_llama())
        trainer = quiet_trainer(callbacks=[replay_of(uses_per_sample=1)], max_steps=-1, max_epochs=2)
        trainer.fit(module, datamodule=ReplayDataModule(loader, 0.2))
        assert trainer.global_step == 16
        assert trainer.callback_metrics["replay/rows_sampled"] == 32
        seen.append(weights(module))
    assert torch.equal(*seen)


def test_a_run_that_runs_out_of_time_has_replayed_until_then(tiny_llama: Make) -> None:
    drawn, module = DrawnRows(), UserModule(tiny_llama())
    data = ReplayDataModule(mapping_loader(), 0.2)
    trainer = quiet_trainer(callbacks=[replay_of("ntp"), drawn], max_steps=-1, max_epochs=-1, max_time={"seconds": 1.5})
    trainer.fit(module, datamodule=data)
    assert 0 < trainer.global_step == len(drawn.rows) == len(module.losses)
    assert data.feed.replay_tokens == 2 * 12 * trainer.global_step
    assert "training_step" not in vars(module)


class Evaluated(UserModule):
    """Validates, tests and predicts; draws random numbers while it does."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))
        self.log("val_random", torch.rand(()))
        assert len(batch["input_ids"]) == 8

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))
        self.log("test_random", torch.rand(()))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits: Tensor = self.model(**batch).logits
        return logits


class WithAll(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return mapping_loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return mapping_loader(16)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"num_sanity_val_steps": 0}])
def test_validation_test_and_prediction_are_those_without_the_plugin(tiny_llama: Make, options: Any) -> None:
    """In a run that replays nothing, to compare; sanity checks and validation in mid-epoch included."""
    seen = []
    for plugin in (False, True):
        L.seed_everything(1)
        module = Evaluated(tiny_llama(attention_dropout=0.2))
        data: Any = ReplayDataModule(WithAll(), 0.0) if plugin else WithAll()
        callbacks = [replay_of(), monitor_of()] if plugin else []
        trainer = quiet_trainer(callbacks=callbacks, max_steps=8, **options)
        trainer.fit(module, datamodule=data)
        figures: list[Any] = [
            {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val", "train"))}
        ]
        figures += trainer.validate(module, datamodule=data, verbose=False)
        figures += trainer.test(module, datamodule=data, verbose=False)
        predictions: Any = trainer.predict(module, datamodule=data)
        seen.append((figures, torch.cat(predictions), torch.get_rng_state()))
    assert seen[0][0] == seen[1][0]
    assert seen[0][0][0]["val_loss"] > 0
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[0][2], seen[1][2])


def test_validation_of_a_run_with_replay_is_that_of_its_weights(tiny_llama: Make) -> None:
    module, data = Evaluated(tiny_llama()), ReplayDataModule(WithAll(), 0.2)
    trainer = quiet_trainer(callbacks=[replay_of(), monitor_of()], max_steps=8, val_check_interval=4)
    trainer.fit(module, datamodule=data)
    during = float(trainer.callback_metrics["val_loss"])
    alone = quiet_trainer().validate(Evaluated(module.model), WithAll().val_dataloader(), verbose=False)
    assert during == pytest.approx(alone[0]["val_loss"], abs=1e-6)
    assert len(module.losses) == 8


def test_a_monitored_value_stops_the_run_and_chooses_the_checkpoint(tiny_llama: Make, tmp_path: Path) -> None:
    monitor = monitor_of(every_n_steps=1)
    stop = EarlyStopping("forgetting/prior", mode="min", patience=2, check_on_train_epoch_end=True)
    saver = ModelCheckpoint(tmp_path, "{step}", "forgetting/prior", every_n_epochs=1, save_top_k=1)
    module = UserModule(tiny_llama(), learning_rate=0.05)
    trainer = quiet_trainer(
        callbacks=[monitor, stop, saver], enable_checkpointing=True, max_steps=-1, max_epochs=20, limit_train_batches=2
    )
    shifted = DataLoader(Rows(64, seed=8), batch_size=8)  # the prior set is of the same kind, so first it gains
    trainer.fit(module, datamodule=ReplayDataModule(shifted, 0.0))
    assert saver.best_model_score == stop.best_score
    best = UserModule(tiny_llama())
    best.load_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"])
    again = monitor_of(kl=False)
    values = quiet_trainer(callbacks=[again], max_steps=1)
    values.fit(best, mapping_loader())
    assert again.baseline["prior"] - monitor.baseline["prior"] == pytest.approx(float(stop.best_score), abs=1e-5)
    assert stop.wait_count == (2 if stop.stopped_epoch else 0) or trainer.current_epoch == 20


def test_two_monitors_measure_what_each_does_alone(tiny_llama: Make) -> None:
    def run(*sets: tuple[str, int]) -> dict[str, float]:
        monitors = [ForgettingMonitor({name: mapping_loader(rows)}, every_n_steps=3) for name, rows in sets]
        trainer = quiet_trainer(callbacks=[replay_of(), *monitors])
        trainer.fit(UserModule(tiny_llama()), datamodule=ReplayDataModule(mapping_loader(), 0.2))
        return {k: float(v) for k, v in trainer.callback_metrics.items() if k.endswith(("/one", "/other"))}

    both = run(("one", 8), ("other", 16))
    assert len(both) == 10
    assert both == run(("one", 8)) | run(("other", 16))


def test_several_fits_with_one_trainer_end_as_with_a_trainer_each(tiny_llama: Make) -> None:
    def run(same: bool) -> Tensor:
        module, data = UserModule(tiny_llama()), ReplayDataModule(mapping_loader(), 0.2)
        trainer = quiet_trainer(callbacks=[replay_of(), monitor_of()], max_steps=-1, max_epochs=1)
        trainer.fit(module, datamodule=data)
        if same:
            trainer.fit_loop.max_epochs = 2
        else:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            trainer = quiet_trainer(callbacks=callbacks, max_steps=-1, max_epochs=1)
        trainer.fit(module, datamodule=data)
        return weights(module)

    assert torch.equal(run(True), run(False))


def test_an_error_in_the_user_s_step_leaves_a_run_that_can_begin_again(tiny_llama: Make) -> None:
    class Fails(UserModule):
        fails = True

        def loss(self, batch: Any) -> Tensor:
            if self.fails and len(self.batches) == 3:
                raise RuntimeError("the user's own")
            return super().loss(batch)

    failed, module, data = weights(tiny_llama()), Fails(tiny_llama()), ReplayDataModule(mapping_loader(), 0.2)
    callbacks = [replay_of(), monitor_of()]
    with pytest.raises(RuntimeError, match="the user's own"):
        quiet_trainer(callbacks=callbacks).fit(module, datamodule=data)
    assert not module.model._forward_hooks
    assert not module.model._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.training
    assert "training_step" not in vars(module)
    assert not torch.equal(weights(module), failed)
    # From the same start it trains as if nothing had happened.
    module.model.load_state_dict(tiny_llama().state_dict())
    module.fails, fresh = False, UserModule(tiny_llama())
    data, callbacks = ReplayDataModule(mapping_loader(), 0.2), [replay_of(), monitor_of()]
    quiet_trainer(callbacks=callbacks).fit(module, datamodule=data)
    data, callbacks = ReplayDataModule(mapping_loader(), 0.2), [replay_of(), monitor_of()]
    quiet_trainer(callbacks=callbacks).fit(fresh, datamodule=data)
    assert torch.equal(weights(module), weights(fresh))
