import importlib.metadata
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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
        (
            torch.randn(*shape, 11, generator=generator, dtype=torch.float32),
            torch.randint(11, shape, generator=generator),
        )
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


@pytest.mark.parametrize("kind", [TokenLoss, Perplexity, TokenAccuracy, KLDrift])
def test_metrics_take_the_keyword_arguments_of_torchmetrics(kind: Any) -> None:
    metric = kind(ignore_index=-1, sync_on_compute=False, compute_on_cpu=True)
    assert (metric.ignore_index, metric.sync_on_compute, metric.compute_on_cpu) == (-1, False, True)
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `sync_on_computer`"):
        kind(sync_on_computer=False)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_metrics_are_the_same_whatever_the_default_type(default: torch.dtype) -> None:
    """As inside a validation step under `precision="bf16-true"`."""
    values = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            metrics = TokenLoss(), TokenAccuracy(), KLDrift()
            for logits, targets in batches():
                logits = logits.bfloat16()
                metrics[0].update(logits, targets)
                metrics[1].update(logits, targets)
                metrics[2].update(logits, logits.roll(1, -1), targets)
            values.append([float(metric.compute()) for metric in metrics])
        finally:
            torch.set_default_dtype(torch.float32)
    assert values[0] == values[1]


def test_the_loss_holds_where_torchmetrics_overflows() -> None:
    logits = torch.zeros(1, 1, 2)
    logits[..., 0] = 110
    ours, theirs = TokenLoss(), TorchmetricsPerplexity()
    for metric in (ours, theirs):
        metric.update(logits, torch.tensor([[1]]))
    assert float(ours.compute()) == 110
    assert math.isinf(float(theirs.compute()))


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


@pytest.fixture
def avalanche(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Avalanche's metric modules alone: importing all of the package takes torchvision."""
    try:
        folder = Path(str(importlib.metadata.distribution("avalanche-lib").locate_file("avalanche")))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("compares with Avalanche: pip install --no-deps avalanche-lib")
    for name in ("avalanche", "avalanche.evaluation.metrics"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    from avalanche.evaluation.metrics import accuracy, mean

    package.Accuracy, package.Mean = accuracy.Accuracy, mean.Mean  # type: ignore[attr-defined]
    package.TaskAwareAccuracy = accuracy.TaskAwareAccuracy  # type: ignore[attr-defined]
    yield package
    for name in [name for name in sys.modules if name.startswith("avalanche.")]:
        del sys.modules[name]


TASKS, EXAMPLES = 5, 40


def answered(seed: int, avalanche: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answers that a learner gives after no task and after each, and the accuracies that Avalanche finds in them."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (TASKS, EXAMPLES), generator=generator)
    guesses = torch.randint(4, (TASKS + 1, TASKS, EXAMPLES), generator=generator)
    known = torch.rand(guesses.shape, generator=generator) < torch.rand(TASKS + 1, TASKS, 1, generator=generator)
    answers = torch.where(known, targets, guesses)
    matrix = torch.zeros(TASKS + 1, TASKS, dtype=torch.float64)
    for stage in range(TASKS + 1):
        for task in range(TASKS):
            accuracy = avalanche.Accuracy()
            accuracy.update(answers[stage, task], targets[task])
            matrix[stage, task] = accuracy.result()
    overall = avalanche.Accuracy()
    overall.update(answers[-1].flatten(), targets.flatten())
    return matrix[1:], matrix[0], torch.tensor(overall.result())


def mean_of(values: dict[int, float], avalanche: Any) -> float:
    mean = avalanche.Mean()
    for value in values.values():
        mean.update(value)
    result: float = mean.result()
    return result


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(5))
def test_continual_learning_metrics_equal_avalanche_s_on_the_same_answers(avalanche: Any, seed: int) -> None:
    from avalanche.evaluation.metrics.forgetting_bwt import BWT, Forgetting
    from avalanche.evaluation.metrics.forward_transfer import ForwardTransfer

    matrix, untrained, overall = answered(seed, avalanche)
    forgetting, from_the_best, backward, forward = Forgetting(), Forgetting(), BWT(), ForwardTransfer()
    for task in range(TASKS - 1):
        for metric in (forgetting, backward):
            metric.update(task, float(matrix[task, task]), initial=True)
        from_the_best.update(task, float(matrix[:-1, task].max()), initial=True)
        for metric in (forgetting, from_the_best, backward):
            metric.update(task, float(matrix[-1, task]))
        forward.update(task + 1, float(untrained[task + 1]), initial=True)
        forward.update(task + 1, float(matrix[task, task + 1]))
    assert average_accuracy(matrix) == pytest.approx(float(overall))
    assert backward_transfer(matrix) == pytest.approx(mean_of(backward.result(), avalanche))
    assert forward_transfer(matrix, untrained) == pytest.approx(mean_of(forward.result(), avalanche))
    # Avalanche counts from the accuracy right after the task, Chaudhry et al. from the best one before the last.
    assert -backward_transfer(matrix) == pytest.approx(mean_of(forgetting.result(), avalanche))
    assert forgetting_measure(matrix) == pytest.approx(mean_of(from_the_best.result(), avalanche))
    assert forgetting_measure(matrix) > mean_of(forgetting.result(), avalanche)


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
