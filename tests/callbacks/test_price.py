"""A budget where old and new task exclude each other, so that drift, loss and price are known in closed form.

The old task follows each token with the next one, the new task with the one before. Of what the model puts on the new
answer, e, the old one lacks: the divergence from a model that is sure of the old answer is -log(1 - e), and the new
task's loss -log(e). At a divergence of b that loss is -log(1 - exp(-b)), and its derivative with respect to b is
-1 / (exp(b) - 1).
"""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_replay import ForgettingBudget, Sampling, SelfGeneratedReplay
from tests.helpers.modules import UserModule, quiet_trainer

TOKENS = 32
FIRST = 3
"""The id of the first of them."""


class AdamModule(UserModule):
    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def pairs(difference: int, batches: int) -> DataLoader[Any]:
    """Rows of two tokens, the second one this much further."""
    tokens = torch.randint(TOKENS, (batches, 32, 1), generator=torch.Generator().manual_seed(1))
    rows = FIRST + torch.cat([tokens, (tokens + difference) % TOKENS], -1)
    return DataLoader([{"input_ids": each, "labels": each} for each in rows], batch_size=None)  # type: ignore[arg-type]


@pytest.fixture
def sure_of_the_old_task(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    model = tiny_llama(
        vocab_size=FIRST + TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=1, initializer_range=0.02
    )
    module = AdamModule(model, 3e-3)
    quiet_trainer(max_steps=400).fit(module, pairs(1, 400))
    assert fmean(module.losses[-50:]) < 0.01
    return model


class Drift(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics.get("replay/drift", 0.0)))


def finetuned(model: LlamaForCausalLM, budget: float, steps: int) -> tuple[float, float, Any]:
    """The new task's loss in the last three hundred steps, the drift in them, and the budget's controller."""
    prompts = [[FIRST + token] for token in range(TOKENS)]
    replay = SelfGeneratedReplay(
        coefficient=ForgettingBudget(budget),
        replay_fraction=0.5,
        uses_per_sample=1,
        sequence_length=2,
        sampling=Sampling(prompts=prompts),
    )
    module, drift = AdamModule(model, 3e-4), Drift()
    quiet_trainer(max_steps=steps, callbacks=[replay, drift]).fit(module, pairs(-1, steps))
    assert module.losses[0] > 5
    return fmean(module.losses[-300:]), fmean(drift.values[-300:]), replay.step.budget


def least_loss(divergence: float) -> float:
    return -math.log(1 - math.exp(-divergence))


@pytest.mark.slow
def test_a_settled_run_has_drift_loss_and_price_of_the_closed_form_and_no_room(
    sure_of_the_old_task: LlamaForCausalLM,
) -> None:
    budget = 0.1
    loss, drift, controller = finetuned(sure_of_the_old_task, budget, 4000)
    assert drift == pytest.approx(budget, rel=0.02)
    # The budget is the mean's; where the tokens' own divergences differ, the loss is higher than where all are at it.
    assert least_loss(budget) < loss < least_loss(0.9 * budget)
    assert controller.price == pytest.approx(1 / (math.exp(budget) - 1), rel=0.1)
    assert controller.verdict.helps == "room"


@pytest.mark.slow
def test_a_run_that_has_learned_all_and_may_forget_needs_nothing(sure_of_the_old_task: LlamaForCausalLM) -> None:
    loss, drift, controller = finetuned(sure_of_the_old_task, 20.0, 1000)
    assert loss < 0.05
    assert drift < 20
    assert controller.verdict.helps == "nothing"
