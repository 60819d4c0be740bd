import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_replay import (
    EMA,
    KL,
    Cached,
    Copy,
    ForgettingMonitor,
    LanguageModel,
    ReplayBuffer,
    ReplayDataModule,
    Sampling,
    SelfGeneratedReplay,
    sample_rows,
)
from lightning_replay.filters import Length
from lightning_replay.models.language_model import find_language_model
from lightning_replay.references.models import FrozenCopy
from lightning_replay.sampling.samples import Samples
from tests.helpers.by_hand import ByHand, train, weights
from tests.helpers.modules import (
    DrawnRows,
    HandWritten,
    OwnCrossEntropy,
    PairModule,
    PlainDescent,
    Rows,
    TokensModule,
    UserModule,
    mapping_loader,
    pair_loader,
    quiet_trainer,
    tensor_loader,
)
from tests.helpers.prompts import chat_tokenizer

Make = Callable[..., LlamaForCausalLM]
Prompts = Sequence[Sequence[int]]
REPLAY = torch.randint(3, 32, (64, 12), generator=torch.Generator().manual_seed(7))


def fixed_rows(model: LanguageModel, prompts: Prompts, length: int, generator: torch.Generator) -> Tensor:
    """Stands in for the sampler with rows that are known beforehand."""
    return REPLAY[: len(prompts)]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("loss", ["kl", "ntp"])
def test_training_equals_a_loss_written_by_hand(tiny_llama: Make, loss: Any, options: dict[str, Any]) -> None:
    ours, hand, drawn = PlainDescent(tiny_llama()), tiny_llama(), DrawnRows()
    replay = SelfGeneratedReplay(loss, 2.0, refill_rows=32, sampling=Sampling(sampler=fixed_rows, length=12))
    train(ours, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, gradient_clip_val=0.5, **options)
    theirs = ByHand(hand, tiny_llama(), drawn.rows, loss, 2.0)
    quiet_trainer(gradient_clip_val=0.5, **options).fit(theirs, mapping_loader())
    torch.testing.assert_close(weights(ours.model), weights(hand), atol=2e-5, rtol=1e-4)
    moved = float((weights(hand) - weights(tiny_llama())).abs().max())
    assert moved > 1e-2


# bfloat16 has 8 bits, and the gradient of a chunk of logits is rounded to it before it is scaled, not after.
@pytest.mark.parametrize(("precision", "rounding"), [("32-true", 1e-4), ("bf16-mixed", 2**-6)])
def test_the_gradient_of_the_kl_is_that_of_a_loss_written_by_hand(
    tiny_llama: Make, precision: str, rounding: float
) -> None:
    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: L.LightningModule, optimizer: Any) -> None:
            self.seen = {name: parameter.grad.clone() for name, parameter in pl_module.named_parameters()}  # type: ignore[union-attr]

    # The reference differs from the model by two steps, so that the divergence is not zero.
    options: dict[str, Any] = {"max_steps": 2, "accumulate_grad_batches": 2, "precision": precision}
    ours, drawn, gradients = PlainDescent(tiny_llama()), DrawnRows(), Gradients()
    replay = SelfGeneratedReplay(coefficient=5.0, refill_rows=32, sampling=Sampling(sampler=fixed_rows, length=12))
    train(ours, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, gradients, **options)
    theirs, expected = ByHand(tiny_llama(), tiny_llama(), drawn.rows, "kl", 5.0), Gradients()
    quiet_trainer(callbacks=[expected], **options).fit(theirs, mapping_loader())
    for name, gradient in expected.seen.items():
        scale = float(gradient.abs().max())
        error = float((gradients.seen[name] - gradient).abs().max())
        assert error <= scale * rounding, name


@pytest.mark.parametrize("loss", ["kl", "ntp", "mixed"])
@pytest.mark.parametrize("kind", ["model's own loss", "own cross-entropy", "tokens", "pairs"])
def test_modules_written_without_replay_in_mind_train_under_every_loss(tiny_llama: Make, kind: str, loss: Any) -> None:
    make: dict[str, Callable[[], tuple[UserModule, Any]]] = {
        "model's own loss": lambda: (UserModule(tiny_llama()), mapping_loader()),
        "own cross-entropy": lambda: (OwnCrossEntropy(tiny_llama()), mapping_loader()),
        "tokens": lambda: (TokensModule(HandWritten()), tensor_loader()),
        "pairs": lambda: (PairModule(HandWritten()), pair_loader()),
    }
    torch.manual_seed(0)
    module, loader = make[kind]()
    before = weights(module)
    trainer = train(
        module,
        ReplayDataModule(loader, 0.2),
        SelfGeneratedReplay(loss, refill_rows=16, sampling=Sampling(prompts=[[1]])),
    )
    seen = module.batches[0]
    rows = len(seen["input_ids"] if isinstance(seen, dict) else seen[0] if isinstance(seen, list) else seen)
    assert rows == (10 if loss == "mixed" else 8)
    assert not torch.equal(weights(module), before)
    assert trainer.callback_metrics["replay/rows_sampled"] == 16
    assert ("replay/loss" in trainer.callback_metrics) == (loss != "mixed")


def test_the_user_s_loss_is_that_of_the_new_rows_alone(tiny_llama: Make) -> None:
    for kind in (UserModule, OwnCrossEntropy):
        alone, replayed = kind(tiny_llama()), kind(tiny_llama())
        quiet_trainer(max_steps=1).fit(alone, mapping_loader())
        train(replayed, ReplayDataModule(mapping_loader(), 0.5), SelfGeneratedReplay(refill_rows=16), max_steps=1)
        assert replayed.losses == pytest.approx(alone.losses, rel=1e-5)


def test_a_fraction_of_zero_changes_no_bit(tiny_llama: Make) -> None:
    results = []
    for plugin in (False, True):
        L.seed_everything(3)
        module = UserModule(tiny_llama(attention_dropout=0.3))
        loader = mapping_loader(shuffle=True)
        monitor = ForgettingMonitor({"prior": mapping_loader(16, shuffle=True)}, every_n_steps=2)
        callbacks = [SelfGeneratedReplay(), monitor] if plugin else []
        quiet_trainer(callbacks=callbacks, max_steps=12).fit(
            module, datamodule=ReplayDataModule(loader, 0.0)
        ) if plugin else quiet_trainer(max_steps=12).fit(module, loader)
        results.append((weights(module), torch.get_rng_state(), module.losses))
    (plain, plain_state, plain_losses), (ours, our_state, our_losses) = results
    assert torch.equal(plain, ours)
    assert torch.equal(plain_state, our_state)
    assert plain_losses == our_losses


def test_sampling_leaves_the_random_state_alone(tiny_llama: Make) -> None:
    class States(L.Callback):
        def __init__(self) -> None:
            self.states: list[Tensor] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.states.append(torch.get_rng_state())

    def careless(model: LanguageModel, prompts: Prompts, length: int, generator: torch.Generator) -> Tensor:
        torch.rand(100)
        return fixed_rows(model, prompts, length, generator)

    seen = []
    for sampler in (None, careless):
        L.seed_everything(0)
        states = States()
        replay = SelfGeneratedReplay("ntp", refill_rows=2, sampling=Sampling(sampler=sampler, length=12))
        train(UserModule(tiny_llama()), ReplayDataModule(mapping_loader(shuffle=True), 0.2), replay, states)
        seen.append(torch.stack(states.states))
    assert torch.equal(*seen)


def test_each_row_is_used_once_and_then_replaced(tiny_llama: Make) -> None:
    module, drawn = UserModule(tiny_llama()), DrawnRows()
    replay = SelfGeneratedReplay(refill_rows=6, sampling=Sampling(length=12))
    trainer = train(module, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, max_steps=8)
    used = torch.cat(drawn.rows)
    assert len(used) == 16  # 8 steps of 2 rows, from refills of 6 rows
    assert len(used.unique(dim=0)) == 16
    assert trainer.callback_metrics["replay/rows_sampled"] == 18
    assert trainer.callback_metrics["replay/buffer_fill"] == 1
    assert trainer.callback_metrics["replay/sampling_seconds"] > 0


@pytest.mark.parametrize("source", ["reference", "live"])
def test_samples_come_from_the_source(tiny_llama: Make, source: Any) -> None:
    module, drawn, states = UserModule(tiny_llama(), learning_rate=0.1), DrawnRows(), []

    def recorded(model: LanguageModel, prompts: Prompts, length: int, generator: torch.Generator) -> Samples:
        states.append(weights(model.module))
        assert not model.module.training
        return sample_rows(model, prompts, length, generator)

    replay = SelfGeneratedReplay("ntp", source=source, refill_rows=2, sampling=Sampling(sampler=recorded))
    train(module, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, max_steps=3)
    assert len(states) == 3
    assert torch.equal(states[0], weights(tiny_llama()))
    assert torch.equal(states[0], states[2]) == (source == "reference")
    assert module.model.training


def test_longer_samples_are_cut_into_rows(tiny_llama: Make) -> None:
    for sampling, starts in (
        (Sampling(), 0.5),
        (Sampling(length=12), 1.0),
        (Sampling(prompts=[[1]]), 0.5),
        (Sampling(prompts=[[1, 3]]), 1.0),
    ):
        drawn = DrawnRows()
        replay = SelfGeneratedReplay("ntp", refill_rows=32, sampling=sampling)
        train(UserModule(tiny_llama()), ReplayDataModule(mapping_loader(), 0.5), replay, drawn, max_steps=4)
        rows = torch.cat(drawn.rows)
        assert rows.shape == (32, 12)
        # Half of the rows are second halves, which begin with the beginning token by chance alone.
        assert float((rows[:, 0] == 1).float().mean()) == pytest.approx(starts, abs=0.1)


def test_rows_take_their_prompts_in_turn(tiny_llama: Make) -> None:
    drawn = DrawnRows()
    replay = SelfGeneratedReplay("ntp", refill_rows=8, sampling=Sampling(prompts=[[5, 3], [6, 3], [7, 3]]))
    train(UserModule(tiny_llama()), ReplayDataModule(mapping_loader(), 0.5), replay, drawn, max_steps=3)
    assert torch.cat(drawn.rows)[:, 0].bincount().tolist() == [0, 0, 0, 0, 0, 8, 8, 8]
    assert torch.cat(drawn.rows)[:, 1].unique().tolist() == [3]


def test_a_lora_run_takes_its_base_model_as_reference(tiny_llama: Make) -> None:
    def adapted() -> PlainDescent:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return PlainDescent(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)))

    module, drawn = adapted(), DrawnRows()
    replay = SelfGeneratedReplay(coefficient=5.0, refill_rows=16)
    train(module, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, gradient_clip_val=0.5)
    theirs = adapted()
    by_hand = ByHand(theirs.model, tiny_llama(), drawn.rows, "kl", 5.0)
    quiet_trainer(gradient_clip_val=0.5).fit(by_hand, mapping_loader())
    torch.testing.assert_close(weights(module.model), weights(theirs.model), atol=2e-5, rtol=1e-4)
    assert float((weights(theirs.model) - weights(adapted().model)).abs().max()) > 1e-2
    assert sum(parameter.requires_grad for parameter in module.model.parameters()) == 8


def test_everything_is_put_back_after_the_fit_and_after_an_error(tiny_llama: Make) -> None:
    class Failing(UserModule):
        def loss(self, batch: Any) -> Tensor:
            if len(self.batches) == 3:
                raise RuntimeError("the user's own")
            return super().loss(batch)

    for kind in (UserModule, Failing):
        module, data = kind(tiny_llama()), ReplayDataModule(mapping_loader(), 0.2)
        instance_step = None
        if kind is Failing:
            instance_step = module.training_step
            module.training_step = instance_step  # type: ignore[method-assign]
        replay = SelfGeneratedReplay(refill_rows=16)
        if kind is Failing:
            with pytest.raises(RuntimeError, match="the user's own"):
                train(module, data, replay)
        else:
            train(module, data, replay)
        assert module.__dict__.get("training_step") is instance_step
        assert (data.feed.source, data.feed.joins_batch, data.drawn) == (None, True, None)
        assert not module.model._forward_hooks
        assert all(child.training for child in module.modules())


def test_several_fits_take_the_reference_again(tiny_llama: Make) -> None:
    module, data = UserModule(tiny_llama()), ReplayDataModule(mapping_loader(), 0.2)
    references: list[Tensor] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            with replay.reference.get(trainer, None).active() as reference:  # type: ignore[arg-type]
                references.append(weights(reference.module))

    replay = SelfGeneratedReplay(refill_rows=16)
    trainer = train(module, data, replay, Look(), max_steps=2)
    between = weights(module)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, datamodule=data)
    assert torch.equal(references[1], weights(tiny_llama()))
    assert torch.equal(references[3], between)
    # What was left of the first fit's samples was not used in the second: 2 of 2 × 16 rows were.
    assert replay.rows.buffer is not None
    assert replay.rows.buffer.unused == 12
    assert trainer.callback_metrics["replay/rows_sampled"] == 32


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tiny_llama: Make, tmp_path: Path, lora: bool) -> None:
    def run(checkpoint: Path | None = None) -> tuple[UserModule, L.Trainer]:
        module = UserModule(
            get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])) if lora else tiny_llama()
        )
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = quiet_trainer(
            max_steps=8, enable_checkpointing=True, callbacks=[SelfGeneratedReplay(refill_rows=6, seed=5), saver]
        )
        data = ReplayDataModule(mapping_loader(32), 0.2)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return module, trainer

    straight, first = run()
    torch.manual_seed(0)
    resumed, second = run(tmp_path / "step=4.ckpt")
    assert torch.equal(weights(straight), weights(resumed))
    for key in ("replay/loss", "replay/rows_sampled"):
        assert first.callback_metrics[key] == second.callback_metrics[key]
    first.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["lightning_replay_reference"]
    assert saved is None if lora else torch.equal(saved["lm_head.weight"], tiny_llama().lm_head.weight)


def test_figures_and_samples_reach_the_loggers(tiny_llama: Make, tmp_path: Path) -> None:
    class Words:
        bos_token_id = 1

        def decode(self, row: list[int]) -> str:
            return " ".join(f"word{token}" for token in row)

    loggers = [TensorBoardLogger(tmp_path, version="tensorboard"), CSVLogger(tmp_path, version="csv")]
    replay = SelfGeneratedReplay(tokenizer=Words(), refill_rows=4)
    replay.previews = 2
    train(
        UserModule(tiny_llama()),
        ReplayDataModule(mapping_loader(), 0.2),
        replay,
        logger=loggers,
        log_every_n_steps=2,
    )
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "tensorboard")).Reload()
    for key in ("replay/loss", "replay/buffer_fill", "replay/sampling_seconds", "replay/rows_sampled"):
        assert [event.step for event in events.Scalars(key)] == [1, 3, 5]
    assert [event.value for event in events.Scalars("replay/rows_sampled")] == [4, 8, 12]
    previews = events.Tensors("replay/samples/text_summary")
    assert [event.step for event in previews] == [0, 2, 4]
    assert previews[0].tensor_proto.string_val[0].decode().count("word1 ") >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "mse"}, "'kl', 'ntp', 'mixed'"),
        ({"source": "teacher"}, "'reference', 'live'"),
        ({"coefficient": -1.0}, "at least 0 and finite; got -1.0"),
        ({"coefficient": float("nan")}, "got nan"),
        ({"refill_rows": 0}, "`refill_rows`"),
        ({"sequence_length": 1}, "`sequence_length`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfGeneratedReplay(**arguments)


class Manual(UserModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False


class ReadsIterator(UserModule):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


class NoLogits(UserModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(nn.Linear(3, 3))


def buffer_of(token: int, length: int = 12) -> ReplayBuffer:
    buffer = ReplayBuffer(4, length)
    buffer.add(torch.full((4, length), token))
    return buffer


@pytest.mark.parametrize(
    ("module", "data", "replay", "message"),
    [
        (UserModule, {"wrap": False}, {"loss": "mixed"}, "to the batches of a ReplayDataModule.*given no datamodule"),
        (ReadsIterator, {"wrap": False}, {}, "dataloader_iter"),
        (UserModule, {}, {"replay_fraction": 0.3}, "`replay_fraction=0.3`, and the ReplayDataModule has 0.2"),
        (Manual, {}, {"loss": "kl"}, "`lightning_replay.forward_kl`"),
        (Manual, {}, {"loss": "ntp"}, "`lightning_replay.next_token_loss`"),
        (ReadsIterator, {}, {}, "dataloader_iter"),
        (NoLogits, {}, {}, "`language_model`"),
        (UserModule, {}, {"language_model": "gpt"}, "names no module"),
        (UserModule, {}, {"sampling": Sampling(prompts=[[32]])}, "token id 32.*vocabulary of 32"),
        (UserModule, {"buffer": buffer_of(40)}, {}, "token id 40.*vocabulary of 32"),
        (UserModule, {"buffer": buffer_of(4, length=33)}, {}, "Samples of 33 tokens don't fit.*takes 32"),
        (UserModule, {}, {"sequence_length": 33}, "Samples of 33 tokens don't fit"),
        (UserModule, {}, {"sequence_length": 12, "sampling": Sampling(length=30)}, "not a multiple of the 12"),
        (UserModule, {"buffer": buffer_of(4)}, {"sequence_length": 8}, "Leave one of them out"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    tiny_llama: Make, module: type[UserModule], data: dict[str, Any], replay: dict[str, Any], message: str
) -> None:
    user = module(tiny_llama())
    options = dict(data)
    wrap = options.pop("wrap", True)
    trainer = quiet_trainer(callbacks=[SelfGeneratedReplay(**replay)])
    with pytest.raises(MisconfigurationException, match=message):
        if wrap:
            trainer.fit(user, datamodule=ReplayDataModule(mapping_loader(), 0.2, **options))
        else:
            trainer.fit(user, mapping_loader())
    assert not user.batches


def test_rows_longer_than_the_context_are_refused_when_the_data_tells_their_length(tiny_llama: Make) -> None:
    module = UserModule(tiny_llama(max_position_embeddings=8))
    with pytest.raises(MisconfigurationException, match="Samples of 12 tokens don't fit"):
        train(module, ReplayDataModule(mapping_loader(), 0.2), SelfGeneratedReplay())
    assert not module.batches


def test_a_model_without_a_known_start_token_asks_for_prompts() -> None:
    module = TokensModule(HandWritten())
    with pytest.raises(MisconfigurationException, match=r"`sampling=lightning_replay.Sampling\(prompts=\[\[token_id"):
        train(module, ReplayDataModule(tensor_loader(), 0.2), SelfGeneratedReplay())
    assert not module.batches


def test_a_step_that_never_calls_the_model_is_told(tiny_llama: Make) -> None:
    class Bypass(UserModule):
        def loss(self, batch: Any) -> Tensor:
            return self.model.forward(**batch).loss  # type: ignore[no-any-return]

    module = Bypass(tiny_llama())
    before = weights(module)
    with pytest.raises(MisconfigurationException, match="never called LlamaForCausalLM"):
        train(module, mapping_loader(), SelfGeneratedReplay("lwf"))
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize(
    ("by_hand", "options"),
    [
        ("reverse", {"loss": KL(direction="reverse")}),
        ("softened", {"loss": KL(temperature=2.0)}),
        ("kl", {"reference": "copy"}),
        ("kl", {"uses_per_sample": 3, "refill_rows": 5}),
    ],
)
def test_other_divergences_and_uses_equal_a_loss_written_by_hand(
    tiny_llama: Make, by_hand: str, options: dict[str, Any]
) -> None:
    ours, hand, drawn = PlainDescent(tiny_llama()), tiny_llama(), DrawnRows()
    replay = SelfGeneratedReplay(coefficient=2.0, **{"refill_rows": 32} | options, sampling=Sampling(length=12))
    train(ours, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, gradient_clip_val=0.5)
    theirs = ByHand(hand, tiny_llama(), drawn.rows, by_hand, 2.0)
    quiet_trainer(gradient_clip_val=0.5).fit(theirs, mapping_loader())
    torch.testing.assert_close(weights(ours.model), weights(hand), atol=2e-5, rtol=1e-4)
    assert float((weights(hand) - weights(tiny_llama())).abs().max()) > 1e-2


class LwfByHand(PlainDescent):
    """Learning without forgetting, written into the step."""

    def __init__(self, model: nn.Module, reference: nn.Module) -> None:
        super().__init__(model)
        self.reference: list[nn.Module] = [reference.eval()]

    def loss(self, batch: Any) -> Tensor:
        output = self.model(**batch)
        with torch.no_grad():
            before = self.reference[0](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mask = batch["labels"][:, 1:] != -100
        p, q = output.logits[:, :-1].log_softmax(-1), before[:, :-1].log_softmax(-1)
        total: Tensor = output.loss + 0.5 * (q.exp() * (q - p)).sum(-1)[mask].mean()
        return total


class Masked(DataLoader):  # type: ignore[type-arg]
    """Batches of which some is padding and some no target, as chat data is."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            labels, mask = batch["labels"].clone(), batch["attention_mask"].clone()
            labels[:, :4] = -100
            labels[::2, 9:] = -100
            mask[::2, 9:] = 0
            yield {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}


def test_learning_without_forgetting_equals_a_loss_written_by_hand_and_needs_no_replay_data(tiny_llama: Make) -> None:
    results = []
    for module, data, callbacks in (
        (LwfByHand(tiny_llama(), tiny_llama()), Masked(Rows(), batch_size=8), []),
        (PlainDescent(tiny_llama()), Masked(Rows(), batch_size=8), [SelfGeneratedReplay("lwf", 0.5)]),
        (
            PlainDescent(tiny_llama()),
            ReplayDataModule(Masked(Rows(), batch_size=8), 0.2),
            [SelfGeneratedReplay("lwf", 0.5)],
        ),
    ):
        trainer = train(module, data, *callbacks, gradient_clip_val=0.5)
        results.append(weights(module.model))
        assert ("replay/loss" in trainer.callback_metrics) == bool(callbacks)
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)
    assert torch.equal(results[1], results[2])
    assert float((results[0] - weights(tiny_llama())).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["own cross-entropy", "tokens", "pairs"])
def test_learning_without_forgetting_works_with_every_kind_of_module(tiny_llama: Make, kind: str) -> None:
    torch.manual_seed(0)
    module, loader = {
        "own cross-entropy": lambda: (OwnCrossEntropy(tiny_llama()), mapping_loader()),
        "tokens": lambda: (TokensModule(HandWritten()), tensor_loader()),
        "pairs": lambda: (PairModule(HandWritten()), pair_loader()),
    }[kind]()
    trainer = train(module, loader, SelfGeneratedReplay("lwf"))
    assert float(trainer.callback_metrics["replay/loss"]) > 0


def test_a_cached_reference_of_the_whole_vocabulary_trains_as_a_frozen_copy_does(tiny_llama: Make) -> None:
    results = {}
    kinds: list[tuple[Any, int]] = [("copy", 1), ("cached", 32), ("cached", 4)]
    for kind, top_k in kinds:
        module, data, drawn = PlainDescent(tiny_llama()), ReplayDataModule(mapping_loader(), 0.2), DrawnRows()
        reference = Copy() if kind == "copy" else Cached(top_k=top_k)
        replay = SelfGeneratedReplay("kl", 2.0, reference, refill_rows=12, seed=1, sampling=Sampling(length=12))
        train(module, data, replay, drawn, gradient_clip_val=0.5)
        results[kind, top_k] = weights(module.model), torch.cat(drawn.rows)
        assert isinstance(replay.reference.taken, FrozenCopy) == (kind == "copy")
    assert torch.equal(results["copy", 1][1], results["cached", 32][1])
    exact = results["copy", 1][0]
    error, rough = (float((results["cached", k][0] - exact).abs().max()) for k in (32, 4))
    assert error < 1e-3  # 16-bit log-probabilities
    assert error < rough


def test_a_cached_reference_samples_what_the_run_needs_and_never_again(tiny_llama: Make) -> None:
    module, data = UserModule(tiny_llama(), learning_rate=0.1), ReplayDataModule(mapping_loader(), 0.2)
    trainer = train(module, data, SelfGeneratedReplay(reference="cached"), max_steps=8)
    assert trainer.callback_metrics["replay/rows_sampled"] == 16
    module, data = UserModule(tiny_llama()), ReplayDataModule(mapping_loader(), 0.2)
    trainer = train(module, data, SelfGeneratedReplay(reference="cached", refill_rows=4), max_steps=8)
    assert trainer.callback_metrics["replay/rows_sampled"] == 4
    assert trainer.callback_metrics["replay/uses"] > 1


def test_a_cached_reference_with_an_adapter_is_refilled_and_real_rows_carry_it_too(tiny_llama: Make) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    real = Rows(16).tokens
    data = ReplayDataModule(mapping_loader(), 0.2, prior=real, prior_share=0.5)
    replay = SelfGeneratedReplay(refill_rows=2, reference=Cached(top_k=32))
    trainer = train(UserModule(model), data, replay, max_steps=6)
    assert trainer.callback_metrics["replay/rows_sampled"] == 6
    assert data.prior is not None
    assert data.prior.top_k == 32


def test_the_moving_average_follows_each_optimizer_step(tiny_llama: Make) -> None:
    class Weights(L.Callback):
        def __init__(self) -> None:
            self.seen = [weights(tiny_llama())]

        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            self.seen.append(weights(pl_module.model))

        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.seen.append(weights(pl_module.model))

    module, seen = UserModule(tiny_llama()), Weights()
    replay = SelfGeneratedReplay(reference=EMA(decay=0.7))
    trainer = train(module, ReplayDataModule(mapping_loader(), 0.2), replay, seen, accumulate_grad_batches=2)
    steps = [one for one, other in zip(seen.seen, seen.seen[1:], strict=False) if not torch.equal(one, other)]
    expected = steps[0]
    for weight in (*steps[1:], seen.seen[-1]):
        expected = 0.7 * expected + 0.3 * weight
    with replay.reference.get(trainer, find_language_model(module, None)).active() as average:
        torch.testing.assert_close(weights(average.module), expected)


def column(logger: CSVLogger, name: str) -> list[float]:
    """The values that were logged under a name, in order."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize(("every", "values"), [(1, 3), (2, 2), (3, 1), (50, 1)])
def test_the_last_step_is_logged_once_however_seldom_steps_are(
    tiny_llama: Make, tmp_path: Path, every: int, values: int
) -> None:
    logger, replay = CSVLogger(tmp_path), SelfGeneratedReplay(replay_fraction=0.2)
    trainer = quiet_trainer(callbacks=[replay], logger=logger, max_steps=3, log_every_n_steps=every)
    trainer.fit(UserModule(tiny_llama()), mapping_loader())
    assert [len(column(logger, f"replay/{name}")) for name in ("loss", "rows_sampled")] == [values, values]
    assert replay.step.last_loss is not None
    assert column(logger, "replay/loss")[-1] == pytest.approx(float(replay.step.last_loss))


@pytest.mark.parametrize(("since", "same"), [("fit", False), ("first", True)])
def test_a_sequence_of_fits_keeps_the_first_reference_where_asked(tiny_llama: Make, since: Any, same: bool) -> None:
    module, replay = UserModule(tiny_llama()), SelfGeneratedReplay(reference=Copy(since=since))
    for _ in range(2):
        trainer = train(module, ReplayDataModule(mapping_loader(), 0.2), replay, max_steps=2)
    with replay.reference.get(trainer, find_language_model(module, None)).active() as reference:
        assert torch.equal(weights(reference.module), weights(tiny_llama())) == same


def test_the_coefficient_may_follow_a_schedule(tiny_llama: Make, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    replay = SelfGeneratedReplay(coefficient=lambda step: 2.0 * step)
    module = UserModule(tiny_llama())
    train(module, ReplayDataModule(mapping_loader(), 0.2), replay, logger=logger, log_every_n_steps=1)
    assert column(logger, "replay/coefficient") == [0, 2, 4, 6, 8, 10]
    failing = SelfGeneratedReplay(coefficient=lambda step: 1.0 - step)
    with pytest.raises(ValueError, match="returned for step 2 .* got -1.0"):
        train(UserModule(tiny_llama()), ReplayDataModule(mapping_loader(), 0.2), failing)


def test_rows_are_used_as_often_as_asked_and_their_age_and_uses_are_logged(tiny_llama: Make, tmp_path: Path) -> None:
    logger, drawn = CSVLogger(tmp_path), DrawnRows()
    replay = SelfGeneratedReplay(uses_per_sample=3, refill_rows=4, sampling=Sampling(length=12))
    train(
        UserModule(tiny_llama()),
        ReplayDataModule(mapping_loader(), 0.2),
        replay,
        drawn,
        logger=logger,
        log_every_n_steps=1,
        max_steps=12,
    )
    _, counts = torch.cat(drawn.rows).unique(dim=0, return_counts=True)
    assert counts.tolist() == [3] * 8  # 24 draws of two refills
    # The refill happens before the step, and ages are told after it: 1 to 6 steps, then again.
    assert column(logger, "replay/age") == [1, 2, 3, 4, 5, 6] * 2
    assert column(logger, "replay/uses") == [1, 1, 2, 2, 3, 3] * 2


def lenient(samples: Samples) -> Tensor:
    return torch.ones(len(samples.tokens), dtype=torch.bool)


def test_quality_of_each_refill_and_dropped_samples_are_logged(tiny_llama: Make, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    replay = SelfGeneratedReplay(
        refill_rows=4, sampling=Sampling(filters=[Length(24), lenient], stop_at_eos=True, top_k=8)
    )
    data = ReplayDataModule(mapping_loader(), 0.2)
    train(UserModule(tiny_llama()), data, replay, logger=logger, log_every_n_steps=1, max_steps=4)
    names = ("distinct_1", "distinct_2", "repetition", "log_prob", "ended", "length")
    quality = {name: column(logger, f"replay/quality/{name}") for name in names}
    assert [len(values) for values in quality.values()] == [2] * 6  # 8 rows of two refills
    assert quality["length"] == [24, 24]
    assert all(-3.5 < value < 0 for value in quality["log_prob"])
    assert column(logger, "replay/dropped/length")[-1] > 0
    assert column(logger, "replay/dropped/lenient") == [0] * 4


def test_real_rows_alone_need_no_sampling(tiny_llama: Make) -> None:
    module, drawn, real = PlainDescent(tiny_llama()), DrawnRows(), Rows(64, seed=3).tokens
    data = ReplayDataModule(mapping_loader(), 0.2, prior=real, prior_share=1.0)
    trainer = train(module, data, SelfGeneratedReplay(coefficient=2.0), drawn)
    assert "replay/rows_sampled" not in trainer.callback_metrics
    theirs = ByHand(tiny_llama(), tiny_llama(), drawn.rows, "kl", 2.0)
    quiet_trainer().fit(theirs, mapping_loader())
    torch.testing.assert_close(weights(module.model), weights(theirs.model), atol=2e-5, rtol=1e-4)


def test_real_rows_alone_need_no_start_token() -> None:
    torch.manual_seed(0)
    data = ReplayDataModule(tensor_loader(), 0.2, prior=Rows(16, seed=3).tokens, prior_share=1.0)
    trainer = train(TokensModule(HandWritten()), data, SelfGeneratedReplay())
    assert float(trainer.callback_metrics["replay/loss"]) > 0


def test_a_chat_model_replays_its_own_conversations(tiny_llama: Make) -> None:
    drawn = DrawnRows()
    replay = SelfGeneratedReplay(
        tokenizer=chat_tokenizer(), sequence_length=24, sampling=Sampling(prompts="chat", targets="answer")
    )
    trainer = train(UserModule(tiny_llama()), ReplayDataModule(mapping_loader(), 0.2), replay, drawn)
    assert float(trainer.callback_metrics["replay/loss"]) > 0
    assert float(trainer.callback_metrics["replay/dropped/unanswered"]) > 0
    assert all(row[:2].tolist() == [1, 3] and 4 in row.tolist() for row in torch.cat(drawn.rows))


@pytest.mark.parametrize(
    "options", [{"reference": "ema"}, {"reference": "cached"}, {"loss": "lwf"}, {"source": "live"}]
)
def test_every_reference_resumes_where_it_stopped(tiny_llama: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    def run(checkpoint: Path | None = None) -> UserModule:
        module = UserModule(tiny_llama())
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        often: dict[str, Any] = {} if options.get("loss") == "lwf" else {"refill_rows": 4, "uses_per_sample": 2}
        replay = SelfGeneratedReplay(seed=5, **often, **options)
        data = ReplayDataModule(mapping_loader(24), 0.2, prior=Rows(16, seed=2).tokens, prior_share=0.25)
        trainer = quiet_trainer(enable_checkpointing=True, callbacks=[replay, saver])
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return module

    straight, resumed = run(), run(tmp_path / "step=3.ckpt")
    assert torch.equal(weights(straight), weights(resumed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "cached", "source": "live"}, "Rows of the live model are not among them"),
        ({"reference": "cached", "loss": "lwf"}, "Rows of the new task are not among them"),
        ({"uses_per_sample": 0}, "`uses_per_sample`"),
        ({"replay_fraction": 1.0}, "from 0 to below 1; got 1.0"),
        ({"loss": "lwf", "source": "live"}, "samples nothing, so `source` would have no effect"),
        ({"loss": "lwf", "sampling": Sampling(top_k=3)}, "`sampling.top_k` would have no effect"),
        ({"loss": "lwf", "refill_rows": 3, "uses_per_sample": 1}, "`refill_rows`, `uses_per_sample` would have no"),
        ({"loss": "mixed", "coefficient": 3.0}, "`coefficient` would have no effect"),
        ({"loss": "ntp", "source": "live", "reference": "copy"}, "`reference` would have no effect"),
    ],
)
def test_more_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfGeneratedReplay(**arguments)


def test_an_adapter_that_is_not_there_is_refused(tiny_llama: Make) -> None:
    module = UserModule(tiny_llama())
    with pytest.raises(MisconfigurationException, match="switches a fresh PEFT adapter off"):
        train(module, ReplayDataModule(mapping_loader(), 0.2), SelfGeneratedReplay(reference="adapter"))
    assert not module.batches


def test_values_that_do_not_change_are_logged_at_every_step(tiny_llama: Make, tmp_path: Path) -> None:
    class Validated(UserModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.loss(batch))

    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(
        callbacks=[SelfGeneratedReplay(replay_fraction=0.2, refill_rows=18, coefficient=3.0)],
        logger=logger,
        log_every_n_steps=1,
        val_check_interval=2,
        max_steps=9,
        max_epochs=-1,
        num_sanity_val_steps=0,
    )
    trainer.fit(Validated(tiny_llama()), mapping_loader(40), mapping_loader(16))
    assert len(column(logger, "val/loss")) == 4  # in mid-epoch, and epochs have five steps
    assert column(logger, "replay/coefficient") == [3.0] * 9
    assert column(logger, "replay/rows_sampled") == [18.0] * 9
    assert column(logger, "replay/buffer_fill") == [1.0] * 9
    assert len(column(logger, "replay/loss")) == 9
