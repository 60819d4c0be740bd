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
from lightning.pytorch.utilities import CombinedLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import LlamaForCausalLM

from lightning_replay import ForgettingMonitor, ReplayDataModule, SelfGeneratedReplay, forward_kl
from tests.helpers.modules import (
    HandWritten,
    PairModule,
    Rows,
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


def by_own_generator() -> Any:
    return mapping_loader(64, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))


def by_batch_sampler() -> Any:
    sampler: Any = RandomSampler(range(64), generator=torch.Generator().manual_seed(3))
    return DataLoader(Rows(64), batch_sampler=BatchSampler(sampler, 2, drop_last=False))


@pytest.mark.parametrize(
    "make",
    [lambda: mapping_loader(64, batch_size=2, shuffle=True), by_own_generator, by_batch_sampler],
    ids=["global state", "own generator", "batch sampler"],
)
def test_a_loader_that_shuffles_gives_the_same_batches_each_time(tiny_llama: Make, make: Callable[[], Any]) -> None:
    shuffled = make()
    monitor = ForgettingMonitor({"one": shuffled, "other": shuffled}, every_n_steps=1, max_batches=2, kl=False)
    values: list[tuple[float, float]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            seen = trainer.callback_metrics
            values.append((float(seen["forgetting/one"]), float(seen["prior_loss/one"] - seen["prior_loss/other"])))

    # The order of the training rows, of each epoch anew, moves the global random state.
    trainer = quiet_trainer(callbacks=[monitor, Watch()])
    trainer.fit(UserModule(tiny_llama(), 0.0), mapping_loader(16, shuffle=True))
    assert values == [(0.0, 0.0)] * 6


def test_training_rows_whose_generator_a_set_shares_come_in_the_order_that_they_have_without(tiny_llama: Make) -> None:
    orders = []
    for monitored in (False, True):
        shared = torch.Generator().manual_seed(3)
        training = mapping_loader(16, shuffle=True, generator=shared)
        held_out = mapping_loader(64, batch_size=2, shuffle=True, generator=shared)
        monitor = ForgettingMonitor({"rows": held_out}, every_n_steps=1, max_batches=2, kl=False)
        module = UserModule(tiny_llama())
        quiet_trainer(callbacks=[monitor] if monitored else []).fit(module, training)
        orders.append([batch["input_ids"].tolist() for batch in module.batches])
    assert orders[0] == orders[1]


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


DOCUMENTS = [[3, 4, 5, 6], [7, 8, 9], [20, 21, 22, 23, 24]]


def packed(documents: list[list[int]], **more: Any) -> dict[str, torch.Tensor]:
    """Documents in one row, as Hugging Face's collator for packing gives them."""
    return {
        "input_ids": torch.tensor([[token for document in documents for token in document]]),
        "labels": torch.tensor([[label for document in documents for label in (-100, *document[1:])]]),
        "position_ids": torch.tensor([[place for document in documents for place in range(len(document))]]),
    } | more


def test_packed_rows_are_measured_as_their_documents_one_by_one(tiny_llama: Make) -> None:
    before, model = tiny_llama(), tiny_llama()
    sets = {"packed": [packed(DOCUMENTS), packed(DOCUMENTS[::-1])], "alone": [packed([each]) for each in DOCUMENTS]}
    trainer = quiet_trainer(max_steps=3, callbacks=[ForgettingMonitor(sets)])
    trainer.fit(UserModule(model), mapping_loader())
    losses, drift = [], []
    with torch.no_grad():
        for document in DOCUMENTS:
            tokens = torch.tensor([document])
            ours, theirs = model.eval()(tokens).logits[0, :-1], before.eval()(tokens).logits[0, :-1]
            losses += F.cross_entropy(ours, tokens[0, 1:], reduction="none").tolist()
            drift += forward_kl(ours[None], theirs[None], reduction="none")[0].tolist()
    for name in sets:
        values = trainer.callback_metrics
        assert float(values[f"prior_loss/{name}"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert float(values[f"prior_kl/{name}"]) == pytest.approx(sum(drift) / len(drift), rel=1e-4)


@pytest.mark.parametrize("more", [{}, {"attention_mask": torch.ones(1, 12, dtype=torch.int64)}], ids=["bare", "mask"])
def test_a_packed_set_measures_the_users_own_loss(tiny_llama: Make, more: Any) -> None:
    """With a mask, Hugging Face models attend across documents, in training as in the measurement."""
    batch = packed(DOCUMENTS, **more)
    with torch.no_grad():
        expected = float(tiny_llama().eval()(**batch, use_cache=False).loss)
    monitor = ForgettingMonitor({"packed": [batch]})
    quiet_trainer(max_steps=1, callbacks=[monitor]).fit(UserModule(tiny_llama()), mapping_loader())
    assert monitor.baseline["packed"] == pytest.approx(expected, rel=1e-5)


def test_packed_rows_of_a_peft_model_are_measured_as_those_of_the_model_in_it(tiny_llama: Make) -> None:
    peft = pytest.importorskip("peft")
    baselines = []
    for wrap in (
        lambda model: model,
        lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
    ):
        monitor = ForgettingMonitor({"packed": [packed(DOCUMENTS)]})
        quiet_trainer(max_steps=1, callbacks=[monitor]).fit(UserModule(wrap(tiny_llama())), mapping_loader())
        baselines.append(monitor.baseline["packed"])
    assert baselines[1] == pytest.approx(baselines[0], rel=1e-6)


def test_forgetting_of_fresh_adapters_is_that_of_pefts_comparison_of_methods(tiny_llama: Make) -> None:
    """Mean token loss on texts cut to 768 tokens, after the fit minus before it with the adapters off."""
    peft = pytest.importorskip("peft")
    draw = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, 32, (length,), generator=draw).tolist() for length in (900, 40, 768, 1300, 2, 300)]
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    model = peft.get_peft_model(tiny_llama(max_position_embeddings=1024), config)

    @torch.no_grad()
    def mean_token_loss() -> float:
        losses: list[float] = []
        for text in texts:
            row = torch.tensor(text[:768])
            logits = model.eval()(row[None]).logits[0]
            losses += F.cross_entropy(logits[:-1], row[1:], reduction="none").tolist()
        return sum(losses) / len(losses)

    with model.disable_adapter():
        before = mean_token_loss()
    held_out = [{"input_ids": torch.tensor([text[:768]])} for text in texts]
    monitor = ForgettingMonitor({"texts": held_out}, every_n_steps=0, kl=False)
    trainer = quiet_trainer(callbacks=[monitor])
    trainer.fit(UserModule(model.train()), mapping_loader())
    expected = mean_token_loss() - before
    assert abs(expected) > 0.01
    assert monitor.baseline["texts"] == pytest.approx(before, rel=1e-6)
    assert float(trainer.callback_metrics["forgetting/texts"]) == pytest.approx(expected, rel=1e-4)


def test_packed_rows_for_a_model_that_takes_no_positions_are_refused() -> None:
    module = TokensModule(HandWritten())
    with pytest.raises(MisconfigurationException, match="HandWritten takes no argument of that name"):
        quiet_trainer(callbacks=[ForgettingMonitor({"packed": [packed(DOCUMENTS)]})]).fit(module, tensor_loader())
    assert not module.batches


def test_labels_that_are_not_the_tokens_they_stand_for_are_refused(tiny_llama: Make) -> None:
    tokens = torch.tensor([[3, 4, 5, 6]])
    batch = {"input_ids": tokens, "labels": tokens.roll(-1, 1)}
    with pytest.raises(MisconfigurationException, match="The prior set 'shifted' can't be measured"):
        quiet_trainer(callbacks=[ForgettingMonitor({"shifted": [batch]})]).fit(
            UserModule(tiny_llama()), mapping_loader()
        )


def test_targets_outside_of_the_vocabulary_are_left_out_as_negative_ones_are() -> None:
    """As with `ignore_index=vocabulary`, the label with which some losses leave positions out."""
    tokens, targets = next(iter(pair_loader(8, batch_size=8)))
    baselines = []
    for marker in (-100, 32, 40):
        marked = targets.clone()
        marked[:, -3:] = marker
        torch.manual_seed(0)
        monitor = ForgettingMonitor({"rows": [(tokens, marked)]})
        quiet_trainer(max_steps=1, callbacks=[monitor]).fit(PairModule(HandWritten()), pair_loader())
        baselines.append(monitor.baseline["rows"])
    assert baselines[0] == baselines[1] == baselines[2]


@pytest.mark.parametrize(
    "several",
    [
        CombinedLoader([mapping_loader(), mapping_loader()], "sequential"),
        {"a": mapping_loader(), "b": mapping_loader()},
        [mapping_loader(), mapping_loader()],
    ],
    ids=["combined", "mapping", "list"],
)
def test_several_loaders_in_one_set_are_refused(several: Any) -> None:
    with pytest.raises(TypeError, match="one dataloader, but 'both' is a .* of several"):
        ForgettingMonitor({"both": several})


class TwoModels(UserModule):
    """Trains a student; the other model trains, too."""

    def __init__(self, model: Any, other: Any) -> None:
        super().__init__(model)
        self.other = other


@pytest.mark.parametrize("first", ["monitor", "replay"])
def test_of_two_models_the_monitor_measures_the_one_that_replay_is_for(tiny_llama: Make, first: str) -> None:
    monitor = ForgettingMonitor({"rows": prior()})
    callbacks = [monitor, SelfGeneratedReplay(replay_fraction=0.2, language_model="model", refill_rows=8)]
    module = TwoModels(tiny_llama(0), tiny_llama(1))
    trainer = quiet_trainer(max_steps=1, callbacks=callbacks[:: 1 if first == "monitor" else -1])
    trainer.fit(module, mapping_loader())
    assert monitor.baseline["rows"] == pytest.approx(by_hand(tiny_llama(0), tiny_llama(0))["loss"], rel=1e-5)
    own = ForgettingMonitor({"rows": prior()}, language_model="other", kl=False)
    module = TwoModels(tiny_llama(0), tiny_llama(1))
    replay = SelfGeneratedReplay(replay_fraction=0.2, language_model="model")
    quiet_trainer(max_steps=1, callbacks=[own, replay]).fit(module, mapping_loader())
    assert own.baseline["rows"] == pytest.approx(by_hand(tiny_llama(1), tiny_llama(1))["loss"], rel=1e-5)
