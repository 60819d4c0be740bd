from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_replay import (
    ForgettingMonitor,
    ReplayDataModule,
    ReplayRows,
    Sampling,
    SelfGeneratedReplay,
    forward_kl,
    generate_rows,
    sample_rows,
)
from lightning_replay.callbacks.own_samples import SampleDrift
from lightning_replay.models.language_model import find_language_model
from lightning_replay.utilities.seeds import held_out_seed, stream
from tests.helpers.modules import (
    VOCABULARY,
    DrawnRows,
    HandWritten,
    PairModule,
    TokensModule,
    UserModule,
    mapping_loader,
    quiet_trainer,
    tensor_loader,
)
from tests.helpers.prompts import chat_tokenizer

Make = Callable[..., LlamaForCausalLM]


def held(monitor: ForgettingMonitor) -> ReplayRows:
    assert monitor.own_samples is not None
    assert monitor.own_samples.held is not None
    return monitor.own_samples.held


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@torch.no_grad()
def by_hand(model: nn.Module, before: nn.Module, rows: ReplayRows) -> list[dict[str, list[float]]]:
    """For each row the KL divergence, loss and hits at each position that predicts a token that was drawn."""
    found = []
    for tokens, length, target in zip(rows.tokens, rows.lengths, rows.target_tokens, strict=True):
        row, where = tokens[None, : int(length)], target[1 : int(length)]
        ours, theirs = (each.eval()(row).logits[0, :-1].double() for each in (model, before))
        log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        losses = -log_q.gather(1, row[0, 1:, None])[:, 0]
        hits = ours.argmax(-1) == row[0, 1:]
        found.append({"kl": divergence[where].tolist(), "loss": losses[where].tolist(), "hit": hits[where].tolist()})
    return found


def mean(rows: list[dict[str, list[float]]], name: str) -> float:
    values = [value for row in rows for value in row[name]]
    return sum(values) / len(values)


@pytest.mark.parametrize("replay", [False, True], ids=["alone", "with replay"])
def test_without_prior_data_it_measures_the_divergence_on_samples_of_its_own(tiny_llama: Make, replay: bool) -> None:
    model, before, monitor = tiny_llama(), tiny_llama(), ForgettingMonitor(every_n_steps=2)
    callbacks: list[Callback] = [monitor, SelfGeneratedReplay(refill_rows=16)] if replay else [monitor]
    trainer = quiet_trainer(max_steps=5, callbacks=callbacks)
    trainer.fit(UserModule(model), mapping_loader())
    values, rows = trainer.callback_metrics, by_hand(model, before, held(monitor))
    assert held(monitor).tokens.shape == (64, 12)  # as long as the rows of the batch
    assert (held(monitor).tokens[::2, 0] == 1).all()  # each sample is cut into two rows
    assert float(values["forgetting/self"]) == pytest.approx(mean(rows, "kl"), rel=1e-4)
    assert float(values["forgetting/self"]) > 0.01
    assert float(values["prior_loss/self"]) == pytest.approx(mean(rows, "loss"), rel=1e-5)
    assert float(values["prior_accuracy/self"]) == pytest.approx(mean(rows, "hit"))
    assert "prior_kl/self" not in values
    # All samples have equally many tokens: the error of their mean is that of independent numbers.
    samples = torch.tensor([sum(one["kl"] + two["kl"]) / 22 for one, two in zip(rows[::2], rows[1::2], strict=True)])
    assert float(values["forgetting_error/self"]) == pytest.approx(float(samples.std() / 32**0.5), rel=1e-4)
    start = mean(by_hand(before, before, held(monitor)), "loss")
    assert monitor.baseline["self"] == pytest.approx(start, rel=1e-5)
    if replay:
        assert monitor._own_reference.taken is None


def test_the_rows_are_those_that_the_model_at_fit_start_writes(tiny_llama: Make) -> None:
    monitor = ForgettingMonitor(self_rows=6)
    trainer = quiet_trainer(max_steps=1, callbacks=[monitor, SelfGeneratedReplay(seed=7)])
    trainer.fit(UserModule(tiny_llama()), mapping_loader())
    model = find_language_model(tiny_llama().eval(), None)
    with torch.no_grad():
        samples = sample_rows(model, [[1]] * 3, 24, stream(held_out_seed(7), 0, 1))
    assert torch.equal(held(monitor).tokens, samples.tokens.reshape(6, 12))


def test_the_first_measurement_is_before_the_first_step_and_zero(tiny_llama: Make) -> None:
    class First(Callback):
        seen: dict[str, float]

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if not trainer.global_step:
                self.seen = {name: float(value) for name, value in trainer.callback_metrics.items()}

    first, monitor = First(), ForgettingMonitor(every_n_steps=0)
    quiet_trainer(max_steps=2, callbacks=[monitor, first]).fit(UserModule(tiny_llama()), mapping_loader())
    assert first.seen["forgetting/self"] == pytest.approx(0, abs=1e-6)
    assert first.seen["forgetting_error/self"] == pytest.approx(0, abs=1e-6)
    assert first.seen["prior_loss/self"] == pytest.approx(monitor.baseline["self"], rel=1e-6)


class RandomStates(Callback):
    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.states.append(torch.get_rng_state())


REPLAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "live": {"loss": "ntp", "source": "live"},
    "background": {"reference": "copy", "background": True},
    "cached": {"reference": "cached"},
    "ema": {"reference": "ema"},
}


@pytest.mark.parametrize("first", ["monitor", "replay"])
@pytest.mark.parametrize("kind", [None, *REPLAYS])
def test_replay_rows_weights_and_random_numbers_are_those_without_it(
    tiny_llama: Make, kind: str | None, first: str
) -> None:
    seen = []
    for monitors in ([], [ForgettingMonitor(every_n_steps=1)]):
        L.seed_everything(0)
        model, states, drawn = tiny_llama(attention_dropout=0.2), RandomStates(), DrawnRows()
        callbacks: list[Callback] = [*monitors]
        if kind is not None:
            callbacks += [SelfGeneratedReplay(**{"refill_rows": 4} | REPLAYS[kind])]
        callbacks = callbacks[:: 1 if first == "monitor" else -1] + [states] + ([drawn] if kind else [])
        data = ReplayDataModule(mapping_loader(shuffle=True), 0.2 if kind else 0.0)
        quiet_trainer(callbacks=callbacks).fit(UserModule(model), datamodule=data)
        rows = torch.cat(drawn.rows) if kind else torch.empty(0)
        seen.append((weights(model), torch.stack(states.states), rows))
    for without, with_it in zip(*seen, strict=True):
        assert torch.equal(without, with_it)
    if kind:
        replayed, measured = seen[0][2].tolist(), held(monitors[0]).tokens.tolist()
        assert len(replayed) == 12
        assert not [row for row in measured if row in replayed]


@pytest.mark.parametrize("kind", [None, "auto", "ema"])
def test_a_resumed_run_measures_the_same_rows_to_the_last_bit(
    tiny_llama: Make, tmp_path: Path, kind: str | None
) -> None:
    def run(checkpoint: Path | None, seed: int) -> tuple[ForgettingMonitor, dict[str, float], Tensor]:
        L.seed_everything(seed)
        monitor, module = ForgettingMonitor(every_n_steps=2), UserModule(tiny_llama())
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        replay = [] if kind is None else [SelfGeneratedReplay(refill_rows=8, **REPLAYS[kind])]
        trainer = quiet_trainer(max_steps=8, enable_checkpointing=True, callbacks=[monitor, *replay, saver])
        trainer.fit(module, mapping_loader(32), ckpt_path=checkpoint)
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.endswith("/self")}
        return monitor, values, weights(module)

    straight, values, ends = run(None, 0)
    resumed, again, ends_again = run(tmp_path / "step=4.ckpt", 1)
    for ours, theirs in zip(held(straight), held(resumed), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)  # type: ignore[arg-type]
    assert len(values) == 5
    assert values == again
    assert values["forgetting/self"] > 0.01
    assert straight.baseline == resumed.baseline
    assert torch.equal(ends, ends_again)


def test_a_run_resumed_from_a_checkpoint_without_it_samples_from_the_model_at_fit_start(
    tiny_llama: Make, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3)
    replay: dict[str, Any] = {"refill_rows": 8, "seed": 3}
    trainer = quiet_trainer(max_steps=3, enable_checkpointing=True, callbacks=[SelfGeneratedReplay(**replay), saver])
    trainer.fit(UserModule(tiny_llama()), mapping_loader(32))
    rows = []
    for checkpoint in (None, tmp_path / "step=3.ckpt"):
        monitor, model = ForgettingMonitor(), tiny_llama()
        trainer = quiet_trainer(max_steps=4, callbacks=[SelfGeneratedReplay(**replay), monitor])
        trainer.fit(UserModule(model), mapping_loader(32), ckpt_path=checkpoint)
        rows.append(held(monitor).tokens)
        drift = mean(by_hand(model, tiny_llama(), held(monitor)), "kl")
        assert float(trainer.callback_metrics["forgetting/self"]) == pytest.approx(drift, rel=1e-4)
    assert torch.equal(*rows)


def test_each_fit_measures_samples_of_the_model_that_it_began_with(tiny_llama: Make) -> None:
    model, monitor, rows = tiny_llama(), ForgettingMonitor(self_rows=16), []
    for _ in range(2):
        before = tiny_llama()
        before.load_state_dict(model.state_dict())
        trainer = quiet_trainer(max_steps=4, callbacks=[monitor])
        trainer.fit(UserModule(model), mapping_loader())
        drift = mean(by_hand(model, before, held(monitor)), "kl")
        assert float(trainer.callback_metrics["forgetting/self"]) == pytest.approx(drift, rel=1e-4)
        rows.append(held(monitor).tokens)
    assert not torch.equal(*rows)


def test_own_sets_are_measured_as_without_it(tiny_llama: Make) -> None:
    seen = []
    for rows in (0, 16):
        monitor = ForgettingMonitor({"rows": mapping_loader(20)}, every_n_steps=2, max_batches=1, self_rows=rows)
        trainer = quiet_trainer(callbacks=[monitor])
        trainer.fit(UserModule(tiny_llama()), mapping_loader())
        seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    own = {name for name in seen[1] if name.endswith("/self")}
    assert len(own) == 5
    assert {name: seen[1][name] for name in seen[0] if "seconds" not in name} == {
        name: value for name, value in seen[0].items() if "seconds" not in name
    }
    assert seen[0].keys() == seen[1].keys() - own
    assert monitor.own_samples is not None
    assert len(monitor.own_samples.batches()) == 2  # `max_batches` is for the other set


def test_a_chat_model_is_measured_on_its_own_conversations(tiny_llama: Make) -> None:
    class Chatting(UserModule):
        tokenizer = chat_tokenizer()

    sampling, model, before = Sampling(prompts="chat", targets="answer"), tiny_llama(), tiny_llama()
    prompt = Chatting.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    seen = []
    for callbacks in (
        [ForgettingMonitor(sequence_length=24), SelfGeneratedReplay(sampling=sampling, seed=0)],
        [ForgettingMonitor(sequence_length=24, sampling=sampling)],
    ):
        torch.manual_seed(0)
        model = tiny_llama()
        trainer = quiet_trainer(max_steps=2, callbacks=callbacks)
        trainer.fit(Chatting(model), mapping_loader())
        monitor: Any = callbacks[0]
        rows = held(monitor)
        by_row = by_hand(model, before, rows)
        assert float(trainer.callback_metrics["forgetting/self"]) == pytest.approx(mean(by_row, "kl"), rel=1e-4)
        # Conversations are of different length: the error of a ratio of means, by leaving out one at a time.
        sums = [(sum(row["kl"]), len(row["kl"])) for row in by_row]
        total, count = (sum(part) for part in zip(*sums, strict=True))
        left_out = torch.tensor([(total - each) / (count - tokens) for each, tokens in sums], dtype=torch.float64)
        jackknife = ((len(sums) - 1) / len(sums) * (left_out - left_out.mean()).square().sum()).sqrt()
        assert float(trainer.callback_metrics["forgetting_error/self"]) == pytest.approx(float(jackknife), rel=0.05)
        assert len({tokens for _, tokens in sums}) > 1
        assert all(Chatting.tokenizer.decode(row).startswith(prompt.split()[0]) for row in rows.tokens)
        assert not rows.target_tokens[:, 0].any()
        seen.append(rows.tokens)
    assert torch.equal(*seen)


def test_rows_are_as_long_as_those_of_the_folder_that_replay_reads(tiny_llama: Make, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    generate_rows(str(tmp_path / "model"), 12, tmp_path / "rows", sequence_length=10, seed=5)
    seen = []
    for monitors in ([], [ForgettingMonitor(self_rows=8)]):
        drawn = DrawnRows()
        trainer = quiet_trainer(callbacks=[SelfGeneratedReplay(seed=5), *monitors, drawn])
        trainer.fit(
            UserModule(tiny_llama()), datamodule=ReplayDataModule(mapping_loader(), 0.2, buffer=tmp_path / "rows")
        )
        seen.append(torch.cat(drawn.rows))
    assert torch.equal(*seen)
    assert held(monitors[0]).tokens.shape == (8, 10)


def test_an_adapter_that_is_switched_off_is_the_model_at_fit_start(tiny_llama: Make) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    monitor = ForgettingMonitor()
    trainer = quiet_trainer(callbacks=[monitor])
    trainer.fit(UserModule(adapted), mapping_loader())
    drift = mean(by_hand(adapted, tiny_llama(), held(monitor)), "kl")
    assert float(trainer.callback_metrics["forgetting/self"]) == pytest.approx(drift, rel=1e-3)
    assert drift > 1e-4


def test_a_model_without_a_start_token_is_refused_until_it_has_prompts() -> None:
    module = TokensModule(HandWritten())
    with pytest.raises(
        MisconfigurationException, match=r"`sampling=lightning_replay.Sampling\(prompts=\[\[token_id\]\]\)`"
    ):
        quiet_trainer(callbacks=[ForgettingMonitor()]).fit(module, tensor_loader())
    assert not module.batches
    monitor = ForgettingMonitor(sampling=Sampling(prompts=[[3], [4, 5]]))
    quiet_trainer(callbacks=[monitor]).fit(TokensModule(HandWritten()), tensor_loader())
    assert held(monitor).tokens.shape == (64, 12)
    assert set(held(monitor).tokens[:, 0].tolist()) == {3, 4}


def test_rows_that_cannot_be_sampled_are_refused_before_the_first_step(tiny_llama: Make) -> None:
    for monitor, message in (
        (ForgettingMonitor(sequence_length=40), "Samples of 40 tokens don't fit LlamaForCausalLM, which takes 32"),
        (ForgettingMonitor(self_rows=2), r"The 2 held-out rows are of one sample of 24 tokens.*Raise `self_rows`"),
    ):
        module = UserModule(tiny_llama())
        with pytest.raises(MisconfigurationException, match=message):
            quiet_trainer(callbacks=[monitor]).fit(module, mapping_loader())
        assert not module.batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_rows": 0}, "there is nothing to measure"),
        ({"self_rows": -1}, "`self_rows` is how many rows"),
        ({"kl": False}, "`kl=False` measures without the model at fit start"),
        ({"max_batches": 2}, "`max_batches` is for the sets of `prior`"),
        ({"sequence_length": 1}, "`sequence_length` is a number of tokens"),
        ({"prior": {}}, "Without prior data, leave it out"),
        ({"prior": {"self": mapping_loader()}}, "can't be named 'self'"),
        ({"prior": {"a": mapping_loader()}, "sampling": Sampling()}, "`sampling` would have no effect"),
        ({"prior": {"a": mapping_loader()}, "sequence_length": 8}, "`sequence_length` would have no effect"),
        ({"prior": {"a": mapping_loader()}, "self_rows": 8, "kl": False}, "`kl=False` measures without"),
    ],
)
def test_arguments_out_of_range_or_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgettingMonitor(**options)


def test_two_monitors_of_own_samples_are_refused(tiny_llama: Make) -> None:
    trainer = quiet_trainer(callbacks=[ForgettingMonitor(), ForgettingMonitor({"a": mapping_loader()}, self_rows=8)])
    with pytest.raises(MisconfigurationException, match=r"same name: \['self'\]"):
        trainer.fit(UserModule(tiny_llama()), mapping_loader())


def test_the_error_in_parts_is_that_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 6, 9, 5, generator=generator)
    sizes = [9, 4, 7, 1, 8, 6]
    targets = torch.full((6, 9), -100)
    for row, size in enumerate(sizes):
        targets[row, :size] = 3
    divergence = forward_kl(logits, reference, reduction="none").double()
    sums = torch.stack([divergence[row, :size].sum() for row, size in enumerate(sizes)])
    tokens = torch.tensor(sizes, dtype=torch.float64)
    ratio = sums.sum() / tokens.sum()
    expected = ((sums - ratio * tokens).square().sum() * 6 / 5).sqrt() / tokens.sum()
    metric = SampleDrift()
    for rows in (slice(0, 2), slice(2, 6)):
        flat = [each[rows].flatten(0, 1) for each in (logits, reference, targets)]
        for part in (slice(0, 5), slice(5, None)):  # as chunks of positions come
            metric.update(*(each[None, part] for each in flat))
        metric.end_batch(sizes[rows])
    metric.end_batch([0, 0])
    assert float(metric.compute()) == pytest.approx(float(ratio))
    assert metric.standard_error() == pytest.approx(float(expected))


@pytest.mark.slow
def test_the_error_is_the_spread_of_what_other_rows_would_have_measured(tiny_llama: Make) -> None:
    """The same training each time, measured on other rows."""
    measured, errors = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        trainer = quiet_trainer(max_steps=3, callbacks=[ForgettingMonitor(every_n_steps=0, self_rows=16)])
        trainer.fit(UserModule(tiny_llama()), mapping_loader())
        measured.append(float(trainer.callback_metrics["forgetting/self"]))
        errors.append(float(trainer.callback_metrics["forgetting_error/self"]))
    spread, error = float(torch.tensor(measured).std()), sum(errors) / len(errors)
    assert len(set(measured)) == 40
    assert error == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("pair", [True, False], ids=["(tokens, targets)", "tokens"])
def test_a_model_that_does_not_tell_its_context_is_trained_and_measured_at_full_context(pair: bool) -> None:
    context = 12
    model = HandWritten(context=context)
    length = context + 1 if pair else context  # of a replay row: what the model reads, and a token more to predict
    rows = torch.randint(VOCABULARY, (32, context + 1), generator=torch.Generator().manual_seed(0))
    data = list(zip(rows[:, :-1], rows[:, 1:], strict=True)) if pair else list(rows[:, :context])
    loader: DataLoader[Any] = DataLoader(data, 4)  # type: ignore[arg-type]
    sampling = Sampling(prompts=[[1]])
    replay = SelfGeneratedReplay(sampling=sampling, seed=0, uses_per_sample=1)
    monitor = ForgettingMonitor(self_rows=8)
    module = PairModule(model) if pair else TokensModule(model)
    trainer = quiet_trainer(max_steps=4, callbacks=[replay, monitor])
    trainer.fit(module, loader)
    assert replay.rows.buffer is not None
    assert replay.rows.buffer.length == length
    assert float(trainer.callback_metrics["forgetting/self"]) > 0


@pytest.mark.parametrize("options", [{"sequence_length": 20}, {"sampling": Sampling(prompts=[[1]], length=40)}])
def test_rows_that_a_model_can_not_read_are_refused_before_the_first_step(options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"sampling": Sampling(prompts=[[1]]), "sequence_length": 20} | options
    module = TokensModule(HandWritten(context=12))
    loader: DataLoader[Any] = DataLoader(list(torch.randint(VOCABULARY, (32, 12))), 4)  # type: ignore[arg-type]
    before = weights(module.model)
    with pytest.raises(MisconfigurationException, match=r"can't read samples of .*IndexError.*Set `sequence_length`"):
        quiet_trainer(max_steps=2, callbacks=[SelfGeneratedReplay(**given)]).fit(module, loader)
    assert torch.equal(weights(module.model), before)
