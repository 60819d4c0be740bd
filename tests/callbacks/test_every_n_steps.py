"""Replay rows that go with every n-th optimizer step only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_replay import LanguageModel, ReplayDataModule, Sampling, SelfGeneratedReplay
from tests.callbacks.test_self_generated_replay import column
from tests.helpers.by_hand import train, weights
from tests.helpers.modules import PlainDescent, UserModule, mapping_loader

Make = Callable[..., LlamaForCausalLM]


def numbered(model: LanguageModel, prompts: Any, length: int, generator: torch.Generator) -> Tensor:
    """Stands in for the sampler with rows that differ."""
    return torch.randint(3, 32, (len(prompts), length), generator=torch.Generator().manual_seed(7))


class Watch(L.Callback):
    """Keeps the rows of each batch and the gradient of each step."""

    def __init__(self, replay: SelfGeneratedReplay) -> None:
        self.replay = replay
        self.rows: list[Tensor | None] = []
        self.gradients: list[Tensor] = []

    def on_train_batch_end(self, *args: Any) -> None:
        drawn = self.replay.drawn
        self.rows.append(None if drawn is None else drawn.tokens)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradient = torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()])
        self.gradients.append(gradient.clone())

    @property
    def counts(self) -> list[int]:
        return [0 if rows is None else len(rows) for rows in self.rows]

    @property
    def drawn(self) -> Tensor:
        return torch.cat([rows for rows in self.rows if rows is not None])


def run(
    model: LlamaForCausalLM, every: int, fraction: float = 0.2, alone: bool = False, loader: Any = None, **options: Any
) -> tuple[Watch, L.Trainer]:
    """A fit of a module that learns nothing, so that the gradients of all its steps are of the same weights."""
    settings: dict[str, Any] = {"refill_rows": 48, "seed": 3} | options.pop("replay", {})
    if alone:
        settings["replay_fraction"] = fraction
    replay = SelfGeneratedReplay("ntp", every_n_steps=every, sampling=Sampling(sampler=numbered, length=12), **settings)
    watch = Watch(replay)
    loader = mapping_loader() if loader is None else loader
    data = loader if alone else ReplayDataModule(loader, fraction)
    trainer = train(PlainDescent(model, learning_rate=0.0), data, replay, watch, **options)
    return watch, trainer


@pytest.mark.parametrize("alone", [False, True])
def test_rows_of_several_steps_join_one_of_them(tiny_llama: Make, alone: bool) -> None:
    watch, _ = run(tiny_llama(), 3, alone=alone, max_steps=8)
    assert watch.counts == [0, 0, 6, 0, 0, 6, 0, 0]


@pytest.mark.parametrize("alone", [False, True])
def test_batches_that_are_accumulated_share_the_rows_of_their_step(tiny_llama: Make, alone: bool) -> None:
    watch, _ = run(tiny_llama(), 3, alone=alone, max_steps=6, accumulate_grad_batches=2, max_epochs=-1)
    assert watch.counts == [0, 0, 0, 0, 6, 6] * 2


def test_a_shorter_last_step_of_an_epoch_takes_all_rows_that_are_due(tiny_llama: Make) -> None:
    # Five batches an epoch, in steps of 3 and 2; each batch owes two rows.
    loader = mapping_loader(40)
    watch, _ = run(tiny_llama(), 2, loader=loader, max_epochs=2, max_steps=-1, accumulate_grad_batches=3)
    assert watch.counts == [0, 0, 0, 4, 6] * 2


@pytest.mark.parametrize(
    ("every", "options"),
    [
        (2, {}),
        (3, {"alone": True}),
        (6, {"accumulate_grad_batches": 4, "max_epochs": -1}),
        (3, {"accumulate_grad_batches": 2, "max_epochs": -1, "alone": True}),
        (2, {"fraction": 0.04, "max_steps": 12, "max_epochs": -1}),  # a third of a row for each batch
    ],
)
def test_the_gradients_of_a_cycle_add_up_to_those_of_every_step(
    tiny_llama: Make, every: int, options: dict[str, Any]
) -> None:
    often, _ = run(tiny_llama(), 1, **options)
    seldom, _ = run(tiny_llama(), every, **options)
    assert sorted(seldom.drawn.tolist()) == sorted(often.drawn.tolist())
    assert len(seldom.gradients) == len(often.gradients)
    expected = torch.stack(often.gradients).sum(0)
    torch.testing.assert_close(torch.stack(seldom.gradients).sum(0), expected, atol=2e-5, rtol=1e-4)
    plain, _ = run(tiny_llama(), 1, **options, replay={"coefficient": 0.0})
    replayed = expected - torch.stack(plain.gradients).sum(0)
    assert float(replayed.abs().max()) > 0.1


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_batches_weigh_replay_as_one_batch_of_their_rows_does(tiny_llama: Make, size: int) -> None:
    large, _ = run(tiny_llama(), 1, loader=mapping_loader(48, batch_size=8), max_steps=6)
    small, _ = run(
        tiny_llama(), 1, loader=mapping_loader(48, batch_size=size), max_steps=6, accumulate_grad_batches=8 // size
    )
    assert small.counts.count(1) == len(large.drawn) == 12  # two for eight new rows
    assert sorted(small.drawn.tolist()) == sorted(large.drawn.tolist())
    torch.testing.assert_close(small.gradients, large.gradients, atol=2e-5, rtol=1e-4)


# A row is owed for four new ones.
@pytest.mark.parametrize(
    ("every", "size", "accumulated", "stands_for"), [(1, 1, 1, 4), (2, 8, 1, 2), (1, 4, 1, None), (1, 1, 8, None)]
)
def test_clipping_a_gradient_that_stands_for_several_steps_is_warned_of(
    tiny_llama: Make,
    recwarn: pytest.WarningsRecorder,
    every: int,
    size: int,
    accumulated: int,
    stands_for: int | None,
) -> None:
    for clipped in (None, 1.0):
        run(
            tiny_llama(),
            every,
            loader=mapping_loader(48, batch_size=size),
            accumulate_grad_batches=accumulated,
            gradient_clip_val=clipped,
        )
    warned = [str(warning.message) for warning in recwarn if "can weaken replay" in str(warning.message)]
    assert len(warned) == (0 if stands_for is None else 1)
    assert all(f"stand for {stands_for} batches" in message for message in warned)


def test_a_run_samples_what_its_whole_cycles_use(tiny_llama: Make) -> None:
    for steps, rows in ((8, 12), (9, 18)):
        watch, trainer = run(tiny_llama(), 3, max_steps=steps, max_epochs=-1, replay={"refill_rows": "auto"})
        assert trainer.callback_metrics["replay/rows_sampled"] == rows
        assert len(watch.drawn) == rows


def test_rows_that_a_fit_leaves_over_do_not_join_the_next_one(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay("ntp", every_n_steps=3, refill_rows=6)
    data, watch = ReplayDataModule(mapping_loader(), 0.2), Watch(replay)
    train(UserModule(tiny_llama()), data, replay, watch, max_steps=5)
    train(UserModule(tiny_llama()), data, replay, watch, max_steps=4)
    assert watch.counts == [0, 0, 6, 0, 0, *(0, 0, 6, 0)]


def test_the_figures_logged_are_those_of_the_last_step_that_had_rows(tiny_llama: Make, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run(
        tiny_llama(),
        2,
        max_steps=6,
        logger=logger,
        log_every_n_steps=1,
        replay={"coefficient": 7.0, "refill_rows": 4, "uses_per_sample": 2},
    )
    assert column(logger, "replay/coefficient") == [7.0] * 5
    assert column(logger, "replay/uses") == [1, 1, 2, 2, 1]
    assert column(logger, "replay/age") == [1, 1, 3, 3, 1]
    losses = column(logger, "replay/loss")
    assert losses[0] == losses[1] == pytest.approx(losses[2])  # the same rows under the same weights
    assert 2 < losses[0] < 8  # of one step's mean, not of their sum


@pytest.mark.parametrize("prior", [None, torch.randint(3, 32, (8, 12))])
def test_rows_that_have_to_last_are_sampled_before_the_first_step(tiny_llama: Make, prior: Tensor | None) -> None:
    states: list[Tensor] = []

    def recorded(model: LanguageModel, prompts: Any, length: int, generator: torch.Generator) -> Tensor:
        states.append(weights(model.module))
        return numbered(model, prompts, length, generator)

    replay = SelfGeneratedReplay(
        reference="cached", every_n_steps=2, seed=3, sampling=Sampling(sampler=recorded, length=12)
    )
    data, module = ReplayDataModule(mapping_loader(), 0.2, prior=prior, prior_share=0.9), UserModule(tiny_llama())
    train(module, data, replay, max_steps=8, max_epochs=-1)
    assert len(states) == 1
    assert torch.equal(states[0], weights(tiny_llama()))
    assert not torch.equal(states[0], weights(module.model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` is a number of optimizer steps, at least 1; got 0"),
        ({"every_n_steps": 2, "loss": "mixed"}, "rows that join only every n-th step would weigh less"),
        ({"every_n_steps": 2, "loss": "lwf"}, "samples nothing, so `every_n_steps` would have no effect"),
    ],
)
def test_where_it_would_have_no_effect_it_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfGeneratedReplay(**arguments)


def test_runs_in_which_it_cannot_work_are_refused(tiny_llama: Make) -> None:
    module, replay = UserModule(tiny_llama()), SelfGeneratedReplay(every_n_steps=7)
    with pytest.raises(MisconfigurationException, match="no replay row would join this run of 6 optimizer steps"):
        train(module, mapping_loader(), replay)
    with pytest.raises(MisconfigurationException, match="`mode='replace'` keeps the size of each batch"):
        train(module, ReplayDataModule(mapping_loader(), 0.2, mode="replace"), SelfGeneratedReplay(every_n_steps=2))
    assert not module.batches
