"""Metrics of a language model on text, and of forgetting over a sequence of tasks. They work without a Trainer.

The definitions for a sequence of tasks are those of Lopez-Paz & Ranzato 2017 (GEM; arXiv 1706.08840) and
Chaudhry et al. 2018 (RWalk; arXiv 1801.10112).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_replay.losses import forward_kl
from lightning_replay.utilities.validation import are_ids, described

__all__ = [
    "KLDrift",
    "Perplexity",
    "TokenAccuracy",
    "TokenLoss",
    "average_accuracy",
    "backward_transfer",
    "forgetting_measure",
    "forward_transfer",
    "intransigence",
]


class _TokenMean(Metric):
    """A mean over tokens, summed in 64-bit floats so that sums over millions of tokens stay exact."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean, a scalar; NaN before the first token."""
        return self.total / self.count


class TokenLoss(_TokenMean):
    """Mean negative log-likelihood of the targets, in nats a token.

    Nothing is shifted: ``logits[:, t]`` predicts ``targets[:, t]``. Computed in 32-bit floats whatever the type of the
    logits. Unlike the perplexity, the loss stays finite and exact for tokens of a probability that underflows.

    Args:
        ignore_index: Targets of this value are left out.
        kwargs: Keyword arguments of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If a keyword argument is not one of ``torchmetrics.Metric``.

    Example:
        >>> metric = TokenLoss()
        >>> metric.update(torch.zeros(1, 3, 4), torch.tensor([[0, 3, -100]]))
        >>> metric.compute()  # ln 4
        tensor(1.3863, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits of shape ``(rows, positions, vocabulary)``, targets of ``(rows, positions)``."""
        _check_targets(targets, logits)
        losses = F.cross_entropy(
            logits.float().flatten(0, -2), targets.flatten(), ignore_index=self.ignore_index, reduction="none"
        )
        self.total += losses.double().sum()
        self.count += (targets != self.ignore_index).sum()


class Perplexity(TokenLoss):
    """``exp`` of the mean ``TokenLoss``.

    Args:
        ignore_index: Targets of this value are left out.
        kwargs: Keyword arguments of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If a keyword argument is not one of ``torchmetrics.Metric``.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(1, 3, 4), torch.tensor([[0, 3, -100]]))
        >>> metric.compute()
        tensor(4.0000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The perplexity, a scalar; NaN before the first token."""
        return super().compute().exp()


class TokenAccuracy(_TokenMean):
    """Share of targets that are the model's most likely token. Nothing is shifted, as in ``TokenLoss``.

    Args:
        ignore_index: Targets of this value are left out.
        kwargs: Keyword arguments of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If a keyword argument is not one of ``torchmetrics.Metric``.

    Example:
        >>> metric = TokenAccuracy()
        >>> metric.update(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.tensor([[1, 1]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits of shape ``(rows, positions, vocabulary)``, targets of ``(rows, positions)``."""
        _check_targets(targets, logits)
        counted = targets != self.ignore_index
        self.total += ((logits.argmax(-1) == targets) & counted).sum()
        self.count += counted.sum()


class KLDrift(_TokenMean):
    """Mean forward KL divergence KL(π‖θ) from a reference π to the model θ, in nats a token.

    How far the model has moved from the reference on the given text, in 32-bit floats as ``forward_kl``. KL on the new
    text predicts forgetting (Shenfeld et al. 2025, RL's Razor).

    Args:
        ignore_index: Positions whose target has this value are left out.
        kwargs: Keyword arguments of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: If a keyword argument is not one of ``torchmetrics.Metric``.

    Example:
        >>> metric = KLDrift()
        >>> model, reference = torch.tensor([[[0.25, 0.75]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
        >>> metric.update(model, reference, targets=torch.tensor([[0]]))
        >>> metric.compute()
        tensor(0.1438, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, logits: Tensor, reference_logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits of both models, ``(rows, positions, vocabulary)``, and targets, ``(rows, positions)``."""
        _check_targets(targets, logits)
        counted = targets != self.ignore_index
        divergence = forward_kl(logits, reference_logits, reduction="none")
        self.total += divergence[counted].double().sum()
        self.count += counted.sum()


def average_accuracy(matrix: Tensor) -> float:
    """Mean accuracy over all tasks after the last one (ACC; Lopez-Paz & Ranzato 2017, section 2).

    Args:
        matrix: ``matrix[i, j]`` is the accuracy on task j after training on task i, shape ``(tasks, tasks)``.

    Raises:
        ValueError: If the matrix is not square.

    Example:
        >>> average_accuracy(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        0.75
    """
    return float(_square(matrix)[-1].mean())


def backward_transfer(matrix: Tensor) -> float:
    """Mean change on earlier tasks, from just after each was learned to the end (BWT; Lopez-Paz & Ranzato 2017).

    Negative if tasks are forgotten. Avalanche's ``StreamForgetting`` is its opposite.

    Args:
        matrix: ``matrix[i, j]`` is the accuracy on task j after training on task i, shape ``(tasks, tasks)``.

    Raises:
        ValueError: If the matrix is not square or has fewer than two tasks.

    Example:
        >>> backward_transfer(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        -0.5
    """
    matrix = _square(matrix, tasks=2)
    return float((matrix[-1] - matrix.diagonal())[:-1].mean())


def forward_transfer(matrix: Tensor, untrained: Tensor) -> float:
    """Mean gain on a task from the tasks before it (FWT; Lopez-Paz & Ranzato 2017, section 2).

    Args:
        matrix: ``matrix[i, j]`` is the accuracy on task j after training on task i, shape ``(tasks, tasks)``.
        untrained: Accuracy of the untrained model on each task, shape ``(tasks,)``.

    Raises:
        ValueError: If the matrix is not square or has fewer than two tasks.

    Example:
        >>> forward_transfer(torch.tensor([[1.0, 0.25], [0.5, 1.0]]), untrained=torch.tensor([0.0, 0.125]))
        0.125
    """
    matrix = _square(matrix, tasks=2)
    return float((matrix.diagonal(1) - untrained[1:]).mean())


def forgetting_measure(matrix: Tensor) -> float:
    """Mean drop on earlier tasks, from the best accuracy before the last task to the end.

    Chaudhry et al. 2018, section 3. At least as high as Avalanche's ``StreamForgetting``, which counts from the
    accuracy just after a task was learned.

    Args:
        matrix: ``matrix[i, j]`` is the accuracy on task j after training on task i, shape ``(tasks, tasks)``.

    Raises:
        ValueError: If the matrix is not square or has fewer than two tasks.

    Example:
        >>> forgetting_measure(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        0.5
    """
    matrix = _square(matrix, tasks=2)
    return float((matrix[:-1].max(0).values - matrix[-1])[:-1].mean())


def intransigence(matrix: Tensor, joint: Tensor) -> float:
    """Mean shortfall on each task when learned in sequence, compared with joint training.

    Chaudhry et al. 2018 (section 3) define it for each task; this is the mean over all tasks.

    Args:
        matrix: ``matrix[i, j]`` is the accuracy on task j after training on task i, shape ``(tasks, tasks)``.
        joint: Accuracy on task j of a model trained on tasks 0 to j together, shape ``(tasks,)``.

    Raises:
        ValueError: If the matrix is not square.

    Example:
        >>> intransigence(torch.tensor([[1.0, 0.0], [0.5, 0.75]]), joint=torch.tensor([1.0, 1.0]))
        0.125
    """
    return float((joint - _square(matrix).diagonal()).mean())


def _check_targets(targets: Tensor, logits: Tensor) -> None:
    if not are_ids(targets) or targets.shape != logits.shape[:-1] or targets.device != logits.device:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} on {logits.device} go with targets that are token ids of shape "
            f"{tuple(logits.shape[:-1])}; got {described(targets)}."
        )


def _square(matrix: Tensor, tasks: int = 1) -> Tensor:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < tasks:
        raise ValueError(
            f"The matrix of results has to be square, with a row and a column for each of at least {tasks} tasks; "
            f"got shape {tuple(matrix.shape)}."
        )
    return matrix
