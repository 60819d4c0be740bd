from collections.abc import Callable
from pathlib import Path
from statistics import mean, variance
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_replay import LanguageModel, ReplayDataModule, Sampling, SelfGeneratedReplay
from lightning_replay.callbacks.reuse_gap import ReuseGap
from tests.callbacks.test_self_generated_replay import column
from tests.helpers.by_hand import train
from tests.helpers.modules import Rows, UserModule, mapping_loader

Make = Callable[..., LlamaForCausalLM]


def observed(gap: ReuseGap, *passes: tuple[int, list[float]]) -> ReuseGap:
    """Passes of batches of two rows, each with one number of uses and the losses of its batches."""
    for use, losses in passes:
        for loss in losses:
            gap.observe(torch.tensor(loss, dtype=torch.float64), torch.tensor([use, use], dtype=torch.int32))
    return gap


def test_the_gap_is_that_of_a_first_pass_and_the_two_beside_it() -> None:
    first, used, fresh, again = [2.0, 4.0], [1.0, 2.5], [2.0, 3.0, 2.5], [1.5, 1.0]
    gap = observed(ReuseGap(), (1, first), (2, used), (1, fresh), (2, again))
    assert gap.value is None  # the second pass of the second refill is not over
    observed(gap, (1, [9.0]))
    assert gap.value == pytest.approx(mean(fresh) - (mean(used) + mean(again)) / 2)
    of_mean = [variance(losses) / len(losses) for losses in (fresh, used, again)]
    assert gap.error == pytest.approx((of_mean[0] + (of_mean[1] + of_mean[2]) / 4) ** 0.5)
    assert gap.loss == pytest.approx(mean(fresh))
    assert gap.refills == 1


def test_a_loss_that_is_not_finite_leaves_its_pass_out() -> None:
    gap = observed(ReuseGap(), (1, [2.0, 2.0]), (2, [1.0, float("nan")]), (1, [2.0, 2.0]), (2, [1.0, 1.0]))
    observed(gap, (1, [2.0, 2.0]), (2, [1.5, 1.5]), (1, [2.0, float("inf")]), (2, [9.0, 9.0]), (1, [9.0]))
    assert gap.refills == 1
    assert gap.value == pytest.approx(2.0 - (1.0 + 1.5) / 2)


@pytest.mark.parametrize("uses", [2, 4])
def test_a_linear_trend_cancels_and_what_used_rows_lack_remains(uses: int) -> None:
    gap, step = ReuseGap(), 0
    for _ in range(5):
        for use in range(1, uses + 1):
            losses = [3.0 - 0.01 * (step + batch) - 0.1 * (use > 1) for batch in range(8)]
            observed(gap, (use, losses))
            step += 8
    assert gap.refills == (3 if uses == 2 else 4)  # the last one's second pass is over only once a third has begun
    assert gap.value == pytest.approx(0.1)


def test_refills_are_averaged_the_newest_with_half_of_the_weight() -> None:
    gap = ReuseGap()
    for size in (0.0, 0.4, 0.8, 0.0):  # the first refill and the last one have no gap
        observed(gap, (1, [1.0 + size] * 3), (2, [1.0] * 3))
    assert gap.value == pytest.approx((0.4 + 0.8) / 2)
    assert gap.error == pytest.approx(0)


def test_batches_of_mixed_uses_belong_to_no_pass() -> None:
    gap = observed(ReuseGap(), (1, [1.0] * 3), (2, [1.0] * 3), (1, [2.0] * 3))
    gap.observe(torch.tensor(50.0), torch.tensor([1, 2], dtype=torch.int32))
    observed(gap, (2, [1.0] * 3), (1, [2.0]))
    assert gap.value == pytest.approx(1.0)


def test_a_pass_of_one_batch_is_no_neighbour() -> None:
    gap = observed(ReuseGap(), (1, [1.0] * 3), (2, [1.0]), (1, [2.0] * 3), (2, [1.0] * 3), (1, [2.0]))
    assert gap.value is None


@pytest.mark.parametrize("at", range(1, 14))
def test_it_goes_on_from_its_state_wherever_it_was_saved(at: int) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [(use, float(torch.rand(1, generator=generator))) for _ in range(3) for use in (1, 1, 2, 2, 2)]
    straight, saved, resumed = ReuseGap(), ReuseGap(), ReuseGap()
    observed(straight, *((use, [loss]) for use, loss in batches))
    observed(saved, *((use, [loss]) for use, loss in batches[:at]))
    resumed.load_state_dict(saved.state_dict())
    observed(resumed, *((use, [loss]) for use, loss in batches[at:]))
    assert straight.value is not None
    assert resumed.state_dict() == straight.state_dict()


class Losses(L.Callback):
    """Keeps each step's replay loss and how often its rows have been drawn."""

    def __init__(self, replay: SelfGeneratedReplay) -> None:
        self.replay = replay
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        drawn, loss = self.replay.drawn, self.replay.step.last_loss
        assert drawn is not None
        assert drawn.uses is not None
        assert loss is not None
        self.seen.append((float(drawn.uses.double().mean()), float(loss)))


def test_it_is_logged_from_the_losses_of_the_steps(tiny_llama: Make, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    replay = SelfGeneratedReplay("ntp", uses_per_sample=2, refill_rows=6, seed=3)
    seen = Losses(replay)
    train(
        UserModule(tiny_llama()),
        ReplayDataModule(mapping_loader(), 0.2),
        replay,
        seen,
        logger=logger,
        log_every_n_steps=1,
        max_steps=13,
        max_epochs=-1,
    )
    assert [uses for uses, _ in seen.seen] == [1, 1, 1, 2, 2, 2] * 2 + [1]
    losses = [loss for _, loss in seen.seen]
    expected = mean(losses[6:9]) - (mean(losses[3:6]) + mean(losses[9:12])) / 2
    assert column(logger, "replay/reuse_gap") == [pytest.approx(expected)]


def test_without_reuse_and_with_real_rows_there_is_none(tiny_llama: Make) -> None:
    for uses, prior in ((1, None), (2, Rows(6).tokens)):
        replay = SelfGeneratedReplay("ntp", uses_per_sample=uses, refill_rows=6)
        data = ReplayDataModule(mapping_loader(), 0.4, prior=prior)
        trainer = train(UserModule(tiny_llama()), data, replay, max_steps=16, max_epochs=-1)
        assert "replay/reuse_gap" not in trainer.callback_metrics


def rows_of_their_own(model: LanguageModel, prompts: Any, length: int, generator: torch.Generator) -> Tensor:
    """Rows that can be learned only by heart."""
    return torch.randint(3, 32, (len(prompts), length), generator=generator)


def test_rows_that_are_learned_by_heart_show(tiny_llama: Make) -> None:
    replay = SelfGeneratedReplay(
        "ntp",
        uses_per_sample=8,
        refill_rows=8,
        seed=3,
        sampling=Sampling(sampler=rows_of_their_own, length=12),
    )
    data = ReplayDataModule(mapping_loader(), 0.2)
    train(UserModule(tiny_llama()), data, replay, max_steps=160, max_epochs=-1)
    gap = replay.step.reuse_gap
    assert gap.refills == 4
    assert gap.value is not None
    assert gap.value > 0.3
    assert gap.value > 2 * gap.error
