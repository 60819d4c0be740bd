import logging
import re
import threading
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_replay import (
    ForgettingMonitor,
    LanguageModel,
    NextToken,
    ReplayBuffer,
    ReplayDataModule,
    Sampling,
    SelfGeneratedReplay,
)
from tests.helpers.modules import DrawnRows, Rows, UserModule, mapping_loader, quiet_trainer
from tests.helpers.prompts import chat_tokenizer

Make = Callable[..., LlamaForCausalLM]


def run(model: Any, replay: SelfGeneratedReplay, *callbacks: L.Callback, fraction: float = 0.2, **options: Any) -> Any:
    module, drawn = UserModule(model), DrawnRows()
    data = ReplayDataModule(mapping_loader(), fraction)
    trainer = quiet_trainer(callbacks=[replay, drawn, *callbacks], **options)
    trainer.fit(module, datamodule=data)
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return weights, torch.cat(drawn.rows), trainer, data


def refill_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("replay-refill")]


@pytest.mark.parametrize("loss", ["kl", "ntp"])
def test_rows_made_in_the_background_are_those_made_at_once(tiny_llama: Make, loss: Any) -> None:
    results = []
    for background in (False, True):
        torch.manual_seed(0)
        before, threads = torch.get_rng_state(), torch.get_num_threads()
        replay = SelfGeneratedReplay(loss, refill_rows=6, seed=3, background=background)
        weights, rows, trainer, _ = run(tiny_llama(attention_dropout=0.2), replay, max_steps=12)
        results.append((weights, rows, trainer.callback_metrics["replay/rows_sampled"], torch.get_rng_state()))
        assert not torch.equal(before, torch.get_rng_state())  # dropout draws from it
        assert torch.get_num_threads() == threads
        assert not refill_threads()
    at_once, ahead = results
    assert torch.equal(at_once[0], ahead[0])
    assert torch.equal(at_once[1], ahead[1])
    assert at_once[2] == ahead[2] == 24
    assert torch.equal(at_once[3], ahead[3])


def test_an_error_in_the_user_s_step_ends_what_is_made_ahead(tiny_llama: Make) -> None:
    class Failing(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            assert refill_threads()
            raise RuntimeError("the user's own")

    replay = SelfGeneratedReplay(refill_rows=256, background=True, sequence_length=24, sampling=Sampling(length=24))
    with pytest.raises(RuntimeError, match="the user's own"):
        run(tiny_llama(), replay, Failing())
    assert not refill_threads()


@pytest.mark.parametrize("reason", ["adapter", "live", "ema", "sampler"])
def test_what_changes_while_the_model_trains_is_not_sampled_in_the_background(tiny_llama: Make, reason: str) -> None:
    model = tiny_llama()
    settings: dict[str, dict[str, Any]] = {
        "adapter": {},
        "live": {"source": "live"},
        "ema": {"reference": "ema"},
        "sampler": {"sampling": Sampling(sampler=lambda *given: None)},
    }
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)) if reason == "adapter" else model
    with pytest.raises(MisconfigurationException, match="`background=True` samples a frozen copy"):
        run(adapted, SelfGeneratedReplay(background=True, **settings[reason]))


@pytest.mark.parametrize(
    ("steps", "options", "sampled", "capacity"),
    [
        (6, {}, 12, 12),  # no more than the run uses
        (6, {"uses_per_sample": 2}, 6, 6),
        (6, {"sampling": Sampling(length=12)}, 12, 12),
        (3, {}, 6, 6),
    ],
)
def test_no_row_is_sampled_that_the_run_does_not_use(
    tiny_llama: Make, steps: int, options: dict[str, Any], sampled: int, capacity: int
) -> None:
    replay = SelfGeneratedReplay(**options)
    _, rows, trainer, _ = run(tiny_llama(), replay, max_steps=steps)
    assert len(rows) == 2 * steps
    assert trainer.callback_metrics["replay/rows_sampled"] == sampled
    assert replay.rows.buffer is not None
    assert replay.rows.buffer.capacity == capacity


def test_no_row_is_sampled_for_the_share_of_real_ones(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay("ntp")
    data = ReplayDataModule(mapping_loader(), 1 / 3, prior=Rows(16).tokens, prior_share=0.75)
    trainer = quiet_trainer(callbacks=[replay], max_steps=6)
    trainer.fit(UserModule(tiny_llama()), datamodule=data)
    # 6 steps of 8 new and 4 replay rows, a quarter of which is sampled.
    assert trainer.callback_metrics["replay/rows_sampled"] == 6


def test_a_long_run_is_sampled_in_even_parts(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay("ntp", uses_per_sample=1)
    _, rows, trainer, _ = run(tiny_llama(), replay, fraction=0.9, max_steps=8)
    assert len(rows) == 8 * 72  # 576 rows in three refills of up to 256
    assert replay.rows.buffer is not None
    assert replay.rows.buffer.capacity == 192
    assert trainer.callback_metrics["replay/rows_sampled"] == 576


@pytest.mark.parametrize("asked", [False, True])
def test_before_sampling_it_is_said_how_much_and_that_chats_could_be(
    tiny_llama: Make, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    sampling = Sampling(prompts=["what the"]) if asked else Sampling()
    replay = SelfGeneratedReplay(
        sampling=sampling, replay_fraction=0.2, refill_rows=12, sequence_length=12, tokenizer=chat_tokenizer()
    )
    with caplog.at_level(logging.INFO):
        quiet_trainer(callbacks=[replay], max_steps=2).fit(UserModule(tiny_llama()), mapping_loader())
    (line,) = (record.message for record in caplog.records if record.message.startswith("Replay: sampling "))
    assert line.startswith("Replay: sampling 12 rows of 12 tokens")
    assert ("`Sampling(prompts='chat')`" in line) != asked


def test_the_fit_ends_with_what_replay_cost(tiny_llama: Make, caplog: pytest.LogCaptureFixture) -> None:
    monitor = ForgettingMonitor({"prior": mapping_loader(16)}, every_n_steps=3)
    with caplog.at_level(logging.INFO):
        _, _, trainer, _ = run(tiny_llama(), SelfGeneratedReplay(), monitor)
    (line,) = (record.message for record in caplog.records if record.message.startswith("Replay: of "))
    figures = re.match(
        r"Replay: of ([\d.]+) s, ([\d.]+)% went into the replay loss \(without its backward\), ([\d.]+)% into sampling "
        r"([\d,]+) tokens; trained on ([\d,]+) new and ([\d,]+) replayed tokens; monitoring took ([\d.]+)%\.$",
        line,
    )
    assert figures is not None, line
    total, loss, sampling, *tokens, monitoring = figures.groups()
    assert tokens == ["144", "576", "144"]  # 12 rows sampled; 6 steps of 8 new and 2 replay rows of 12 tokens
    seconds = [float(trainer.callback_metrics[f"{key}_seconds"]) for key in ("replay/loss", "replay/sampling")]
    seconds.append(float(trainer.callback_metrics["forgetting/seconds"]))
    for share, spent in zip((loss, sampling, monitoring), seconds, strict=True):
        assert float(share) / 100 * float(total) == pytest.approx(spent, rel=0.2, abs=0.05)


class FirstLoss(L.Callback):
    """Keeps the replay loss of the first step: 0 on rows of the model as it was then."""

    def __init__(self, replay: SelfGeneratedReplay) -> None:
        self.replay = replay
        self.first = -1.0

    def on_train_batch_end(self, *args: Any) -> None:
        if self.first < 0:
            assert self.replay.step.last_loss is not None
            self.first = float(self.replay.step.last_loss)


def test_cached_rows_of_an_earlier_fit_s_reference_are_refused(tiny_llama: Make) -> None:
    module, replay = UserModule(tiny_llama()), SelfGeneratedReplay(reference="cached", refill_rows=16)

    def fit(buffer: ReplayBuffer) -> float:
        losses = FirstLoss(replay)
        data = ReplayDataModule(mapping_loader(), 0.2, buffer=buffer)
        quiet_trainer(callbacks=[replay, losses]).fit(module, datamodule=data)
        return losses.first

    used = ReplayBuffer(16, 12, top_k=8)
    assert fit(used) < 1e-5
    with pytest.raises(MisconfigurationException, match="holds rows that an earlier fit sampled"):
        fit(used)
    assert fit(ReplayBuffer(16, 12, top_k=8)) < 1e-5


def test_each_fit_counts_the_tokens_that_it_has_sampled_itself(
    tiny_llama: Make, caplog: pytest.LogCaptureFixture
) -> None:
    replay, module = SelfGeneratedReplay(replay_fraction=0.2, refill_rows=12), UserModule(tiny_llama())
    with caplog.at_level(logging.INFO):
        for length in (12, 5):
            quiet_trainer(callbacks=[replay]).fit(module, mapping_loader(length=length))
    lines = [record.message for record in caplog.records if record.message.startswith("Replay: of ")]
    assert [re.findall(r"sampling ([\d,]+) tokens", line) for line in lines] == [["144"], ["60"]]


def test_each_fit_counts_what_its_own_monitors_took(tiny_llama: Make) -> None:
    monitors = [ForgettingMonitor({name: mapping_loader(16)}) for name in ("stories", "news")]
    replay, before = SelfGeneratedReplay(), 0.0
    for _ in range(2):
        _, _, trainer, _ = run(tiny_llama(), replay, *monitors)
        spent = sum(monitor.seconds for monitor in monitors)
        assert float(trainer.callback_metrics["forgetting/seconds"]) == pytest.approx(spent)
        assert replay.monitoring_seconds == pytest.approx(spent - before)
        before = spent


def test_a_buffer_takes_four_bytes_a_token_and_six_a_cached_log_probability() -> None:
    plain, cached = ReplayBuffer(1000, 512), ReplayBuffer(1000, 512, top_k=64)
    assert plain.nbytes / (1000 * 512) == pytest.approx(4, abs=0.05)
    assert (cached.nbytes - plain.nbytes) / (1000 * 511 * 64) == pytest.approx(6, abs=0.05)


class ComparedNextToken(NextToken):
    """A next-token loss that asks the reference, for nothing: one that asks none uses rows once."""

    needs_reference = True


@pytest.mark.parametrize(("steps", "uses"), [(84, 1), (85, 2), (86, 2)])
def test_rows_are_used_again_only_in_a_run_that_has_enough_of_them(tiny_llama: Make, steps: int, uses: int) -> None:
    replay = SelfGeneratedReplay(ComparedNextToken(), sampling=Sampling(sampler=random_rows, length=12))
    _, rows, trainer, _ = run(tiny_llama(), replay, fraction=1 / 3, max_steps=steps, max_epochs=-1)
    assert len(rows) == 4 * steps
    _, counts = rows.unique(dim=0, return_counts=True)
    assert counts.tolist() == [uses] * (4 * steps // uses)
    assert trainer.callback_metrics["replay/rows_sampled"] == 4 * steps // uses


def random_rows(model: LanguageModel, prompts: Any, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, 32, (len(prompts), length), generator=generator)


class Uses(L.Callback):
    """Keeps how often the rows of each step have been drawn, and the gaps measured so far."""

    def __init__(self, replay: SelfGeneratedReplay) -> None:
        self.replay = replay
        self.seen: list[int] = []
        self.refills: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        drawn = self.replay.drawn
        assert drawn is not None
        assert drawn.uses is not None
        self.seen.append(int(drawn.uses.max()))
        self.refills.append(self.replay.step.reuse_gap.refills)


def test_rows_that_are_learned_by_heart_are_used_less_often(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay(
        ComparedNextToken(),
        100.0,
        refill_rows=12,
        seed=3,
        sampling=Sampling(sampler=random_rows, length=12),
    )
    uses = Uses(replay)
    module = UserModule(tiny_llama(hidden_size=128, initializer_range=0.1))  # which has room for what it learns
    quiet_trainer(callbacks=[replay, uses], max_steps=85, max_epochs=-1).fit(
        module, datamodule=ReplayDataModule(mapping_loader(), 1 / 3)
    )
    # 340 rows allow two uses. The second refill has its gap once the third has begun.
    assert uses.seen == [use for use in (1, 2, 1, 2) for _ in range(3)] + [1] * 73
    assert uses.refills == [0] * 12 + [1] * 73


def test_rows_that_are_not_learned_by_heart_are_used_more_often(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay(ComparedNextToken(), 0.0, refill_rows=8, seed=3)
    uses = Uses(replay)
    module = UserModule(tiny_llama(), learning_rate=0.0)
    quiet_trainer(callbacks=[replay, uses], max_steps=88, max_epochs=-1).fit(
        module, datamodule=ReplayDataModule(mapping_loader(), 1 / 3)
    )
    passes = [1, 2, 1, 2, *(1, 2, 3, 4) * 10]
    assert uses.seen == [use for use in passes for _ in range(2)]
    assert uses.refills[-1] == 11


def test_a_loss_without_a_reference_uses_rows_once(tiny_llama: Make) -> None:
    _, _, trainer, _ = run(tiny_llama(), SelfGeneratedReplay("ntp"), fraction=1 / 3, max_steps=85, max_epochs=-1)
    assert trainer.callback_metrics["replay/rows_sampled"] == 340


def test_rows_that_have_to_last_are_used_as_often_as_at_first(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay(reference="cached")
    _, _, trainer, _ = run(tiny_llama(), replay, fraction=1 / 3, max_steps=85, max_epochs=-1)
    assert trainer.callback_metrics["replay/rows_sampled"] == 170  # 340 rows, each twice
    assert trainer.callback_metrics["replay/uses"] == 2
