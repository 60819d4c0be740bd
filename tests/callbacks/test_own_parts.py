"""A loss, a reference, a sampler, a filter, a source of rows and a buffer policy of a user's own: each is one class or
one function outside of the package."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_replay import (
    KL,
    Policy,
    Reference,
    ReplayBuffer,
    ReplayDataModule,
    ReplayLoss,
    ReplayRows,
    RowSource,
    Sampling,
    SelfGeneratedReplay,
)
from lightning_replay.references.models import LiveModel
from lightning_replay.sampling import Samples
from tests.helpers.modules import UserModule, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]


class SquaredDifference(ReplayLoss):
    """A toy loss: the mean squared difference of the log-probabilities of the rows' own tokens."""

    def __call__(self, logits: Tensor, rows: ReplayRows, reference_logits: Callable[[], Tensor]) -> Tensor:
        ours, theirs = (
            given.log_softmax(-1).gather(2, rows.tokens[:, 1:, None])[..., 0] for given in (logits, reference_logits())
        )
        return ((ours - theirs).square() * rows.targets_mask).sum() / rows.targets_mask.sum()


class Seen(L.Callback):
    """Keeps the loss on replay rows of each step, and the rows."""

    def __init__(self, replay: SelfGeneratedReplay) -> None:
        self.replay = replay
        self.losses: list[float] = []
        self.rows: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        assert self.replay.drawn is not None
        self.losses.append(float(trainer.callback_metrics["replay/loss"]))
        self.rows.append(self.replay.drawn.tokens)


def fit(model: Any, replay: SelfGeneratedReplay, data: Any = None) -> tuple[UserModule, Seen]:
    module, seen = UserModule(model), Seen(replay)
    quiet_trainer(callbacks=[replay, seen], max_steps=3).fit(module, data or ReplayDataModule(mapping_loader(), 0.2))
    return module, seen


def test_a_loss(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay(loss=SquaredDifference(), coefficient=1.0, refill_rows=8)
    _, seen = fit(tiny_llama(), replay)
    assert seen.losses[0] == 0  # the model is still the reference
    assert seen.losses[2] > 0


def test_a_reference(tiny_llama: Make) -> None:
    class Other(Reference):
        """Another model than the one that trains."""

        def take(self, model: Any, trainer: L.Trainer) -> Any:
            return LiveModel(model.on(tiny_llama(seed=7)))

    replay = SelfGeneratedReplay(KL(), 0.0, Other(), refill_rows=8)
    _, seen = fit(tiny_llama(), replay)
    tokens = seen.rows[0][:, :-1]
    with torch.no_grad():
        of, given = (model(tokens).logits.log_softmax(-1) for model in (tiny_llama(seed=7), tiny_llama()))
    assert seen.losses[0] == pytest.approx(float((of.exp() * (of - given)).sum(-1).mean()), rel=1e-4)


def test_a_sampler(tiny_llama: Make) -> None:
    def counting(model: Any, prompts: Sequence[Sequence[int]], length: int, generator: torch.Generator) -> Tensor:
        return (3 + torch.arange(length)).expand(len(prompts), -1)

    sampling = Sampling(sampler=counting, length=12)
    _, seen = fit(tiny_llama(), SelfGeneratedReplay("ntp", refill_rows=4, sampling=sampling))
    assert torch.cat(seen.rows).unique(dim=0).tolist() == [list(range(3, 15))]


def test_a_filter(tiny_llama: Make) -> None:
    def ends_even(samples: Samples) -> Tensor:
        return samples.tokens[:, -1] % 2 == 0

    sampling = Sampling(filters=[ends_even], length=12)
    _, seen = fit(tiny_llama(), SelfGeneratedReplay("ntp", refill_rows=8, sampling=sampling))
    assert (torch.cat(seen.rows)[:, -1] % 2 == 0).all()


def test_a_buffer_policy(tiny_llama: Make) -> None:
    class KeepFirst(Policy):
        """Rows that were there first stay."""

        name = "keep first"

        def slots(self, seen: int, arriving: int, capacity: int, generator: torch.Generator) -> Tensor:
            return seen + torch.arange(arriving)

    buffer = ReplayBuffer(4, 12, policy=KeepFirst())
    replay = SelfGeneratedReplay("ntp", refill_rows=4, sampling=Sampling(length=12))
    _, seen = fit(tiny_llama(), replay, ReplayDataModule(mapping_loader(), 0.2, buffer=buffer))
    assert replay.rows.generator.rows == 8
    first, again = torch.cat(seen.rows[:2]), seen.rows[2]
    assert all(row in first.tolist() for row in again.tolist())


def test_a_source_of_rows() -> None:
    class Counter(RowSource):
        """Rows of one token, the next in each draw."""

        token = 2

        def draw(self, rows: int, batch: Any) -> ReplayRows:
            self.token += 1
            return ReplayRows(torch.full((rows, 12), self.token), torch.full((rows,), 12))

    class Own(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.detach = trainer.datamodule.attach(Counter())  # type: ignore[attr-defined]

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.detach()

    class Tokens(UserModule):
        def loss(self, batch: Any) -> Tensor:
            weight: Any = self.model.weight
            return weight.sum() * 0  # type: ignore[no-any-return]

    module, data = Tokens(torch.nn.Linear(2, 2)), ReplayDataModule(mapping_loader(), 0.2)
    quiet_trainer(callbacks=[Own()], max_steps=3).fit(module, datamodule=data)
    replayed = [batch["input_ids"][8:, 0].tolist() for batch in module.batches]
    assert replayed == [[3, 3], [4, 4], [5, 5]]
    assert data.feed.source is None
