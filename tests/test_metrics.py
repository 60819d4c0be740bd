import math

import pytest
import torch
from torchmetrics.text import Perplexity as TorchmetricsPerplexity

from lightning_replay import (
    KLDrift,
    Perplexity,
    TokenAccuracy,
    TokenLoss,
    average_accuracy,
    backward_transfer,
    forgetting_measure,
    forward_kl,
    forward_transfer,
    intransigence,
)

# Three tasks; worked by hand below.
MATRIX = torch.tensor([[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.7, 1.0]], dtype=torch.float64)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (2, 9)]
    return [
        (torch.randn(*shape, 11, generator=generator), torch.randint(11, shape, generator=generator))
        for shape in shapes
    ]


def test_perplexity_and_loss_equal_torchmetrics_where_that_is_exact() -> None:
    ours, loss, theirs = Perplexity(), TokenLoss(), TorchmetricsPerplexity(ignore_index=-100)
    for logits, targets in batches():
        targets = targets.masked_fill(targets == 3, -100)
        for metric in (ours, loss, theirs):
            metric.update(logits, targets)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert float(loss.compute()) == pytest.approx(math.log(float(theirs.compute())), rel=1e-6)


def test_an_impossible_token_keeps_the_loss_finite() -> None:
    logits = torch.zeros(1, 1, 2)
    logits[..., 0] = 110
    metric = TokenLoss()
    metric.update(logits, torch.tensor([[1]]))
    assert float(metric.compute()) == 110


def test_token_accuracy_is_the_share_of_likeliest_tokens_over_all_batches() -> None:
    metric = TokenAccuracy()
    right = total = 0
    for logits, targets in batches():
        metric.update(logits, targets)
        right += sum(
            int(row[t].argmax()) == int(answer[t])
            for row, answer in zip(logits, targets, strict=True)
            for t in range(len(answer))
        )
        total += targets.numel()
    assert float(metric.compute()) == pytest.approx(right / total)


def test_kl_drift_is_the_mean_over_all_batches() -> None:
    metric, divergences = KLDrift(), []
    for logits, targets in batches():
        targets[0, 0] = -100
        metric.update(logits, logits * 0.5, targets)
        divergences.append(forward_kl(logits, logits * 0.5, reduction="none")[targets != -100])
    assert float(metric.compute()) == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-6)


def test_metrics_are_nan_before_any_token() -> None:
    metric = TokenLoss()
    metric.update(torch.zeros(1, 2, 3), torch.full((1, 2), -100))
    assert math.isnan(float(metric.compute()))


def test_continual_learning_metrics_by_hand() -> None:
    assert average_accuracy(MATRIX) == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert backward_transfer(MATRIX) == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert forward_transfer(MATRIX, torch.tensor([0.0, 0.1, 0.1])) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert forgetting_measure(MATRIX) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.7)) / 2)
    assert intransigence(MATRIX, torch.tensor([0.95, 0.9, 1.0])) == pytest.approx((0.05 + 0.1 + 0.0) / 3)


@pytest.mark.parametrize("metric", [backward_transfer, forgetting_measure])
def test_one_task_or_a_ragged_matrix_is_refused(metric: object) -> None:
    for matrix in (torch.ones(1, 1), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="at least 2 tasks"):
            metric(matrix)  # type: ignore[operator]
