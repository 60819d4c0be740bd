from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_replay import (
    ForgettingMonitor,
    LanguageModel,
    ReplayBuffer,
    ReplayDataModule,
    SelfGeneratedReplay,
    forward_kl,
    next_token_loss,
    sample_rows,
)
from lightning_replay.sampling import Samples
from tests.modules import (
    HandWritten,
    OwnCrossEntropy,
    PairModule,
    PlainDescent,
    TokensModule,
    UserModule,
    mapping_loader,
    pair_loader,
    quiet_trainer,
    tensor_loader,
)

Make = Callable[..., LlamaForCausalLM]
Prompts = Sequence[Sequence[int]]
REPLAY = torch.randint(3, 32, (64, 12), generator=torch.Generator().manual_seed(7))


def fixed_rows(model: LanguageModel, prompts: Prompts, length: int, generator: torch.Generator) -> Tensor:
    """Stands in for the sampler with rows that are known beforehand."""
    return REPLAY[: len(prompts)]


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def train(module: L.LightningModule, data: Any, *callbacks: Any, **options: Any) -> L.Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=data)
    return trainer


class ByHand(PlainDescent):
    """The same training with the replay loss written into the step, on rows and a reference of its own.

    The rows go through a forward of their own; with ``joint``, through that of the batch, joined to it by hand, which
    in 16 bits gives other roundings.
    """

    def __init__(
        self, model: nn.Module, reference: nn.Module, rows: list[Tensor], loss: str, coefficient: float, joint: bool
    ) -> None:
        super().__init__(model)
        self.rows = rows
        self.replay_loss = loss
        self.coefficient = coefficient
        self.joint = joint
        self.reference: list[nn.Module] = [reference.eval()]  # in a list, so that it is not a part of the module

    def loss(self, batch: Any) -> Tensor:
        rows = self.rows[self.trainer.fit_loop.total_batch_idx]
        if self.joint:
            tokens = torch.cat([batch["input_ids"], F.pad(rows[:, :-1], (0, 1))])
            labels = torch.cat([batch["labels"], torch.full_like(rows, -100)])
            output = self.model(tokens, labels=labels)
            own, logits = output.loss, output.logits[len(batch["labels"]) :, :-1]
        else:
            own, logits = super().loss(batch), self.model(rows[:, :-1]).logits
        if self.replay_loss == "ntp":
            added = next_token_loss(logits, rows[:, 1:])
        else:
            with torch.no_grad():
                reference = self.reference[0](rows[:, :-1]).logits
            added = forward_kl(logits, reference)
        total: Tensor = own + self.coefficient * added
        return total


class DrawnRows(L.Callback):
    """Keeps the rows that travel with each step."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        drawn = trainer.datamodule.drawn  # type: ignore[attr-defined]
        self.rows.append(drawn.tokens)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("loss", ["kl", "ntp"])
def test_training_equals_a_loss_written_by_hand(tiny_llama: Make, loss: Any, options: dict[str, Any]) -> None:
    ours, hand, drawn = PlainDescent(tiny_llama()), tiny_llama(), DrawnRows()
    replay = SelfGeneratedReplay(loss, 2.0, sampler=fixed_rows, sample_length=12, refill_rows=32)
    train(ours, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, gradient_clip_val=0.5, **options)
    theirs = ByHand(hand, tiny_llama(), drawn.rows, loss, 2.0, joint=False)
    quiet_trainer(gradient_clip_val=0.5, **options).fit(theirs, mapping_loader())
    torch.testing.assert_close(weights(ours.model), weights(hand), atol=2e-5, rtol=1e-4)
    moved = float((weights(hand) - weights(tiny_llama())).abs().max())
    assert moved > 1e-2


@pytest.mark.parametrize(("precision", "joint"), [("32-true", False), ("32-true", True), ("bf16-mixed", True)])
def test_the_gradient_of_the_kl_is_that_of_a_loss_written_by_hand(
    tiny_llama: Make, precision: str, joint: bool
) -> None:
    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: L.LightningModule, optimizer: Any) -> None:
            self.seen = {name: parameter.grad.clone() for name, parameter in pl_module.named_parameters()}  # type: ignore[union-attr]

    # The reference differs from the model by two steps, so that the divergence is not zero.
    options: dict[str, Any] = {"max_steps": 2, "accumulate_grad_batches": 2, "precision": precision}
    ours, drawn, gradients = PlainDescent(tiny_llama()), DrawnRows(), Gradients()
    replay = SelfGeneratedReplay(coefficient=5.0, sampler=fixed_rows, sample_length=12, refill_rows=32)
    train(ours, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, gradients, **options)
    theirs, expected = ByHand(tiny_llama(), tiny_llama(), drawn.rows, "kl", 5.0, joint), Gradients()
    quiet_trainer(callbacks=[expected], **options).fit(theirs, mapping_loader())
    for name, gradient in expected.seen.items():
        scale = float(gradient.abs().max())
        error = float((gradients.seen[name] - gradient).abs().max())
        assert error <= scale * 1e-4, name


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
    trainer = train(module, ReplayDataModule(loader, 0.2), SelfGeneratedReplay(loss, prompts=[[1]], refill_rows=16))
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
        replay = SelfGeneratedReplay("ntp", sampler=sampler, sample_length=12, refill_rows=2)
        train(UserModule(tiny_llama()), ReplayDataModule(mapping_loader(shuffle=True), 0.2), replay, states)
        seen.append(torch.stack(states.states))
    assert torch.equal(*seen)


def test_each_row_is_used_once_and_then_replaced(tiny_llama: Make) -> None:
    module, drawn = UserModule(tiny_llama()), DrawnRows()
    replay = SelfGeneratedReplay(refill_rows=6, sample_length=12)
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

    replay = SelfGeneratedReplay("ntp", source=source, refill_rows=2, sampler=recorded)
    train(module, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, max_steps=3)
    assert len(states) == 3
    assert torch.equal(states[0], weights(tiny_llama()))
    assert torch.equal(states[0], states[2]) == (source == "reference")
    assert module.model.training


def test_longer_samples_are_cut_into_rows(tiny_llama: Make) -> None:
    for options, starts in (({}, 0.5), ({"sample_length": 12}, 1.0), ({"prompts": [[1]]}, 1.0)):
        drawn = DrawnRows()
        replay = SelfGeneratedReplay("ntp", refill_rows=32, **options)
        train(UserModule(tiny_llama()), ReplayDataModule(mapping_loader(), 0.5), replay, drawn, max_steps=4)
        rows = torch.cat(drawn.rows)
        assert rows.shape == (32, 12)
        # Half of the rows are second halves, which begin with the beginning token by chance alone.
        assert float((rows[:, 0] == 1).float().mean()) == pytest.approx(starts, abs=0.1)


def test_rows_take_their_prompts_in_turn(tiny_llama: Make) -> None:
    drawn = DrawnRows()
    replay = SelfGeneratedReplay("ntp", prompts=[[5, 3], [6, 3], [7, 3]], refill_rows=8)
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
    by_hand = ByHand(theirs.model, tiny_llama(), drawn.rows, "kl", 5.0, joint=False)
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
        assert (data.refill, data.joins_batch, data.drawn) == (None, True, None)
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
    assert data.buffer is not None
    assert data.buffer.unused == 12
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
        assert data.buffer is not None
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
    replay = SelfGeneratedReplay(tokenizer=Words(), refill_rows=4, previews=2)
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
        ({"sample_length": 0}, "`sample_length`"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], []]}, "none of them empty"),
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
        (UserModule, {"wrap": False}, {}, "needs the batches of a ReplayDataModule.*given no datamodule"),
        (Manual, {}, {"loss": "kl"}, "`lightning_replay.forward_kl`"),
        (Manual, {}, {"loss": "ntp"}, "`lightning_replay.next_token_loss`"),
        (ReadsIterator, {}, {}, "dataloader_iter"),
        (NoLogits, {}, {}, "`language_model`"),
        (UserModule, {}, {"language_model": "gpt"}, "names no module"),
        (UserModule, {}, {"prompts": [[32]]}, "token id 32.*vocabulary of 32"),
        (UserModule, {"buffer": buffer_of(40)}, {}, "token id 40.*vocabulary of 32"),
        (UserModule, {"buffer": buffer_of(4, length=33)}, {}, "Samples of 33 tokens don't fit.*takes 32"),
        (UserModule, {}, {"sequence_length": 33}, "Samples of 33 tokens don't fit"),
        (UserModule, {}, {"sequence_length": 12, "sample_length": 30}, "not a multiple of the 12"),
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
    with pytest.raises(MisconfigurationException, match=r"Pass `prompts=\[\[token_id\]\]`"):
        train(module, ReplayDataModule(tensor_loader(), 0.2), SelfGeneratedReplay())
    assert not module.batches


def test_a_step_that_never_calls_the_model_is_told(tiny_llama: Make) -> None:
    class Bypass(UserModule):
        def loss(self, batch: Any) -> Tensor:
            return self.model.forward(**batch).loss  # type: ignore[no-any-return]

    module = Bypass(tiny_llama())
    before = weights(module)
    with pytest.raises(MisconfigurationException, match="never called LlamaForCausalLM"):
        train(module, ReplayDataModule(mapping_loader(), 0.2), SelfGeneratedReplay(refill_rows=4))
    assert torch.equal(weights(module), before)
