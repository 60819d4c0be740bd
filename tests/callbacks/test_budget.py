import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_replay import (
    EMA,
    KL,
    Cached,
    ForgettingBudget,
    NextToken,
    ReplayDataModule,
    ReplayLoss,
    Sampling,
    SelfGeneratedReplay,
)
from lightning_replay.callbacks.budget import BudgetController
from lightning_replay.models.calls import evaluating
from tests.callbacks.test_self_generated_replay import column, fixed_rows
from tests.helpers.by_hand import ByHand, train, weights
from tests.helpers.modules import DrawnRows, PlainDescent, UserModule, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]


class Plant:
    """Drift that new data push up and replay pulls back: its rate of change is ``push - pull * coefficient * drift``.

    At rest it is ``push / (pull * coefficient)``, and its time constant is ``1 / (pull * coefficient)`` steps.

    Args:
        budget: The drift to be held.
        coefficient: The coefficient that holds it.
        steps: The time constant at that coefficient.
        noise: Standard deviation of a measurement, relative to the drift.
    """

    def __init__(self, budget: float, coefficient: float, steps: float, noise: float = 0.2) -> None:
        self.pull = 1 / (coefficient * steps)
        self.push = budget / steps
        self.drift = 0.0
        self.noise = noise
        self.chance = torch.Generator().manual_seed(0)

    def run(self, controller: BudgetController, steps: int) -> tuple[list[float], list[float]]:
        """The smoothed drift and the coefficient after each step."""
        drifts, coefficients = [], []
        for step in range(steps):
            noise = self.noise * float(torch.randn((), generator=self.chance))
            controller.observe(self.drift * (1 + noise), 100)
            controller.update(step)
            pull = self.pull * controller.coefficient
            rest = self.push / pull
            self.drift = rest + (self.drift - rest) * math.exp(-pull)  # exact for a step
            drifts.append(controller.drift or 0.0)
            coefficients.append(controller.coefficient)
        return drifts, coefficients


@pytest.mark.parametrize(
    ("coefficient", "steps"), list(product([0.5, 3.0, 30.0, 300.0], [1.0, 3.0, 10.0, 30.0])), ids=str
)
def test_the_drift_is_held_without_oscillation(coefficient: float, steps: float) -> None:
    controller = BudgetController(ForgettingBudget(0.05))
    drifts, coefficients = Plant(0.05, coefficient, steps).run(controller, 600)
    assert mean(drifts[450:]) / 0.05 == pytest.approx(1.0, abs=0.05)
    assert all(0.75 < drift / 0.05 < 1.25 for drift in drifts[400:])
    assert all(0.5 < each / coefficient < 2.0 for each in coefficients[400:])
    assert controller.price == pytest.approx(coefficient, rel=0.1)  # what holds the budget of this plant, exactly


@pytest.mark.parametrize("coefficient", [3.0, 30.0])
def test_the_drift_does_not_shoot_far_beyond_the_budget(coefficient: float) -> None:
    drifts, _ = Plant(0.05, coefficient, 10.0).run(BudgetController(ForgettingBudget(0.05)), 300)
    assert max(drifts[50:]) < 1.25 * 0.05


def test_a_coefficient_at_its_bound_comes_back_at_once() -> None:
    controller = BudgetController(ForgettingBudget(0.05, start=10.0))
    for step in range(500):
        controller.observe(5.0, 1)
        controller.update(step)
    assert controller.coefficient == pytest.approx(10_000.0)
    assert "was not held, with a coefficient of 1e+04" in controller.summary()
    steps = 0
    while controller.coefficient > 9_999:
        controller.observe(0.0, 1)
        controller.update(steps := steps + 1)
    assert steps <= 15  # as long as the average takes, and no longer


def test_a_budget_that_does_not_bind_leaves_the_coefficient_at_its_floor() -> None:
    controller = BudgetController(ForgettingBudget(0.05, start=2.0))
    _, coefficients = Plant(0.001, 2.0, 10.0).run(controller, 50)
    assert set(coefficients) == {2.0}  # the drift is waited for
    for step in range(300):
        controller.observe(0.0, 1)  # a model that has not moved
        controller.update(step)
    assert controller.coefficient == pytest.approx(0.002)
    assert "The budget did not bind" in controller.summary()
    _, coefficients = Plant(0.05, 3.0, 3.0).run(controller, 300)
    assert coefficients[-1] == pytest.approx(3.0, rel=0.5)


def test_steps_without_a_measurement_change_nothing() -> None:
    controller = BudgetController(ForgettingBudget(0.05))
    Plant(0.05, 3.0, 3.0).run(controller, 100)
    before = controller.state_dict()
    controller.update(100)
    controller.observe(math.nan, 7)
    controller.update(101)
    controller.observe(math.inf, 7)
    controller.update(102)
    assert controller.state_dict() == before | {"unmeasured": 3}
    for step in range(60):
        controller.update(step)
    assert "last measured 63 steps before the end" in controller.summary()


def test_measurements_of_a_step_count_by_their_tokens() -> None:
    controller = BudgetController(ForgettingBudget(0.05))
    controller.observe(0.3, 1)
    controller.observe(torch.tensor(0.1), 3)
    assert controller.drift is None
    controller.update(1)
    assert controller.drift == pytest.approx(0.15)


@pytest.mark.parametrize("at", [0, 1, 10, 60, 61, 99])
def test_it_goes_on_from_its_state_wherever_it_was_saved(at: int) -> None:
    straight, saved = (BudgetController(ForgettingBudget(0.05)) for _ in range(2))
    drifts = [0.001 * step for step in range(100)]
    for controller, part in ((straight, drifts), (saved, drifts[:at])):
        for step, drift in enumerate(part):
            controller.observe(torch.tensor(drift), 5)
            controller.update(step)
    saved.observe(torch.tensor(drifts[at]), 5)
    resumed = BudgetController(ForgettingBudget(0.05))
    resumed.load_state_dict(saved.state_dict())
    resumed.update(at)
    for step, drift in enumerate(drifts[at + 1 :], at + 1):
        resumed.observe(torch.tensor(drift), 5)
        resumed.update(step)
    assert resumed.state_dict() == straight.state_dict()


def test_the_budget_may_be_a_function_of_the_step() -> None:
    controller = BudgetController(ForgettingBudget(lambda step: 0.05 if step < 300 else 0.1))
    drifts, _ = Plant(0.05, 3.0, 10.0).run(controller, 700)
    assert mean(drifts[200:300]) == pytest.approx(0.05, rel=0.05)
    assert mean(drifts[500:]) == pytest.approx(0.1, rel=0.05)
    assert controller.values()["replay/budget"] == 0.1


@pytest.mark.parametrize(
    ("drift", "has_price", "words"),
    [
        (0.05, True, "drift 0.05 of 0.05 nats a token; 0.01 nats more would lower the new task's loss by about 0.1,"),
        (0.05, False, "drift 0.05 of 0.05 nats a token, with a coefficient of"),
        (0.0, True, "did not bind"),
        (0.1, True, "drift 0.1 of 0.05 nats a token, which was not held"),
    ],
)
def test_the_end_is_told_in_a_sentence(drift: float, has_price: bool, words: str) -> None:
    controller = BudgetController(ForgettingBudget(0.05), has_price)
    assert "never measured" in controller.summary()
    controller.observe(drift, 1)
    controller.update(1)
    assert words in controller.summary()
    assert ("replay/price" in controller.values()) == has_price


def test_no_gain_is_told_that_is_as_large_as_the_loss() -> None:
    for loss, words in (
        (1.0, "0.01 nats more would lower the new task's loss by about 0.1,"),
        (0.09, "a coefficient of"),
    ):
        controller = BudgetController(ForgettingBudget(0.05))  # of a price of 10
        controller.observe(0.05, 1)
        controller.observe_new_loss(torch.tensor(loss))
        controller.update(1)
        assert words in controller.summary()


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf, True, "0.1", None])
def test_a_budget_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="above 0 and finite"):
        ForgettingBudget(value)
    with pytest.raises(ValueError, match="`start` is the first coefficient"):
        ForgettingBudget(0.1, start=value)
    with pytest.raises(ValueError, match="`budget` returned for step 7"):
        ForgettingBudget(lambda step: value).at(7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "mixed"}, "Mixed adds no loss on them. Use `loss='kl'`"),
        ({"loss": "lwf"}, "LwF adds no loss on them. Use `loss='kl'`"),
        ({"source": "live"}, "Use `source='reference'`"),
        ({"reference": "ema"}, "Use `reference='auto'`"),
        ({"reference": EMA(decay=0.9)}, "Use `reference='auto'`"),
        ({"reference": "cached", "loss": "ntp"}, r"Use `loss=KL\(\)`, or another reference"),
        ({"reference": Cached(top_k=8), "loss": KL(temperature=2.0)}, r"Use `loss=KL\(\)`, or another reference"),
    ],
)
def test_what_leaves_no_drift_to_measure_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SelfGeneratedReplay(coefficient=ForgettingBudget(0.1), **options)


class WholeLogits(ReplayLoss):
    """A loss of one's own: reverse KL, of whole logits."""

    def __call__(self, logits: Tensor, rows: Any, reference_logits: Any) -> Tensor:
        return KL("reverse")(logits, rows, reference_logits)


class Measures(PlainDescent):
    """Measures the drift on rows drawn for the first time before each batch, by a forward of its own."""

    def __init__(self, model: LlamaForCausalLM, before: LlamaForCausalLM, replay: SelfGeneratedReplay) -> None:
        super().__init__(model)
        self.before, self.replay = [before.eval()], replay
        self.drifts: list[tuple[float, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows = self.replay.drawn
        if rows is not None:
            assert rows.uses is not None
            tokens = rows.tokens[rows.uses == 1][:, :-1]
            if len(tokens):
                with evaluating(self.model):
                    theirs, ours = (net(tokens).logits.log_softmax(-1) for net in (self.before[0], self.model))
                self.drifts.append((float((theirs.exp() * (theirs - ours)).sum(-1).mean()), tokens.numel()))
        return super().training_step(batch, batch_idx)


# Two uses of 6 rows, 2 in a batch: batches of new rows, of used ones and, with 5, of both.
@pytest.mark.parametrize("refill_rows", [6, 5])
@pytest.mark.parametrize(
    "loss",
    [KL(), KL("reverse"), KL("jensen_shannon"), KL(temperature=2.0), NextToken(), WholeLogits()],
    ids=["forward", "reverse", "jensen_shannon", "temperature", "next-token", "whole logits"],
)
def test_the_drift_is_the_forward_kl_on_rows_drawn_for_the_first_time(
    tiny_llama: Make, tmp_path: Path, loss: ReplayLoss, refill_rows: int
) -> None:
    replay = SelfGeneratedReplay(
        loss,
        coefficient=ForgettingBudget(10.0, start=2.0),
        replay_fraction=0.2,
        refill_rows=refill_rows,
        uses_per_sample=2,
        seed=0,
    )
    module, logger = Measures(tiny_llama(), tiny_llama(), replay), CSVLogger(tmp_path)
    train(module, mapping_loader(), replay, max_steps=8, logger=logger, log_every_n_steps=1)
    smoothed = module.drifts[0][0]
    for drift, _ in module.drifts[1:]:
        smoothed = 0.9 * smoothed + 0.1 * drift
    assert len(module.drifts) < 8
    assert module.drifts[-1][0] > 1e-4
    assert column(logger, "replay/drift")[-1] == pytest.approx(smoothed, rel=1e-4)
    assert column(logger, "replay/budget") == [10.0] * 8
    assert len(column(logger, "replay/price")) == (8 if loss in (KL(), NextToken()) else 0)


@pytest.mark.parametrize("loss", [KL(), NextToken(), WholeLogits()], ids=["forward", "next-token", "whole logits"])
def test_the_drift_is_that_of_the_model_without_its_dropout(tiny_llama: Make, loss: ReplayLoss) -> None:
    replay = SelfGeneratedReplay(loss, coefficient=ForgettingBudget(10.0), replay_fraction=0.2, seed=0)
    module = Measures(tiny_llama(attention_dropout=0.3), tiny_llama(), replay)
    trainer = train(module, mapping_loader(), replay, max_steps=2)
    (first, _), (second, _) = module.drifts
    assert first < 1e-6
    assert float(trainer.callback_metrics["replay/drift"]) == pytest.approx(0.1 * second, rel=1e-3)
    assert float(trainer.callback_metrics["replay/loss"]) > 2 * second  # of the forward that is trained
    assert all(part.training for part in module.model.modules())


def test_a_budget_is_updated_once_an_optimizer_step(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay(coefficient=ForgettingBudget(10.0), replay_fraction=0.2, seed=0)
    module = Measures(tiny_llama(), tiny_llama(), replay)
    trainer = train(module, mapping_loader(), replay, max_steps=3, accumulate_grad_batches=2)
    pairs = [(one + other) / 2 for (one, _), (other, _) in zip(module.drifts[::2], module.drifts[1::2], strict=True)]
    assert len(pairs) == 3
    expected = 0.9 * (0.9 * pairs[0] + 0.1 * pairs[1]) + 0.1 * pairs[2]
    assert float(trainer.callback_metrics["replay/drift"]) == pytest.approx(expected, rel=1e-4)


class Weighted(ByHand):
    """Both losses divided by one more than the coefficient."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) / (1 + self.coefficient)


@pytest.mark.parametrize("loss", ["kl", "ntp"])
def test_training_equals_weighted_losses_written_by_hand(tiny_llama: Make, loss: Any) -> None:
    ours, hand, drawn = PlainDescent(tiny_llama()), tiny_llama(), DrawnRows()
    replay = SelfGeneratedReplay(
        loss,
        coefficient=ForgettingBudget(10.0, start=2.0),  # so high that the coefficient waits at its start
        refill_rows=32,
        sampling=Sampling(sampler=fixed_rows, length=12),
    )
    train(ours, ReplayDataModule(mapping_loader(), 0.2), replay, drawn, accumulate_grad_batches=2)
    theirs = Weighted(hand, tiny_llama(), drawn.rows, loss, 2.0)
    quiet_trainer(accumulate_grad_batches=2).fit(theirs, mapping_loader())
    torch.testing.assert_close(weights(ours.model), weights(hand), atol=2e-5, rtol=1e-4)
    assert float((weights(hand) - weights(tiny_llama())).abs().max()) > 1e-2


class Losses(L.Callback):
    """Keeps what each step returned, and whether it had replay rows."""

    def __init__(self, replay: SelfGeneratedReplay) -> None:
        self.replay = replay
        self.seen: list[tuple[float, bool]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((float(outputs["loss"]), self.replay.drawn is not None))


def test_the_new_loss_weighs_the_same_in_steps_without_replay_rows(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay(coefficient=ForgettingBudget(10.0, start=3.0), replay_fraction=0.05)
    module, losses = UserModule(tiny_llama()), Losses(replay)
    train(module, mapping_loader(), replay, losses)
    without = [(loss, own) for (loss, rows), own in zip(losses.seen, module.losses, strict=True) if not rows]
    assert len(without) == 4
    assert [loss for loss, _ in without] == pytest.approx([own / 4 for _, own in without])


def test_a_second_fit_begins_anew(tiny_llama: Make) -> None:
    replay, coefficients = SelfGeneratedReplay(coefficient=ForgettingBudget(1e-6, start=3.0), seed=0), []
    for _ in range(2):
        train(UserModule(tiny_llama()), mapping_loader(), replay)
        assert replay.step.budget is not None
        coefficients.append(replay.step.budget.coefficient)
    assert coefficients[0] > 3.0
    assert coefficients == pytest.approx([coefficients[0]] * 2)
