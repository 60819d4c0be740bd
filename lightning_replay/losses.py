"""Replay losses: pure functions of tensors, usable in any training loop."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

__all__ = ["forward_kl", "next_token_loss"]


def forward_kl(
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""Forward KL divergence KL(π‖θ) from the reference π to the model θ, in nats, averaged over positions.

    .. math:: \frac{1}{|M|}\sum_{t \in M} \sum_v \pi_t(v)\,\bigl(\log \pi_t(v) - \log p_t(v)\bigr)

    Over the full vocabulary, at temperature 1, in 32-bit floats whatever the logits' type
    (the regularizer ``kl_pre`` of arXiv 2605.26097).

    Args:
        logits: The model's logits, shape ``(rows, positions, vocabulary)``.
        reference_logits: The reference's, the same shape. No gradient flows into them.
        mask: True at the positions M to average over, shape ``(rows, positions)``. All of them if left out.
        reduction: ``"mean"`` over the mask, or ``"none"`` for the divergence at every position, mask or not.

    Returns:
        A scalar, zero where the mask selects nothing; with ``"none"``, shape ``(rows, positions)``.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> reference = torch.tensor([[[0.5, 0.5]]]).log()
        >>> model = torch.tensor([[[0.25, 0.75]]]).log()
        >>> forward_kl(model, reference)  # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)
        tensor(0.1438)
    """
    if logits.shape != reference_logits.shape:
        raise ValueError(
            f"Model and reference give logits of one shape; got {tuple(logits.shape)} "
            f"and {tuple(reference_logits.shape)}."
        )
    log_probs = logits.float().log_softmax(-1)
    reference_log_probs = reference_logits.detach().float().log_softmax(-1)
    divergence = F.kl_div(log_probs, reference_log_probs, reduction="none", log_target=True).sum(-1)
    return divergence if reduction == "none" else _mean(divergence, mask)


def next_token_loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Cross-entropy of the targets, in nats a token, averaged over positions.

    The regularizer ``ntp_pre`` of arXiv 2605.26097 when the targets are replay rows. Nothing is shifted:
    ``logits[:, t]`` is what the model says of ``targets[:, t]``.

    Args:
        logits: Shape ``(rows, positions, vocabulary)``; taken to 32-bit floats.
        targets: Token ids, shape ``(rows, positions)``.
        mask: True at the positions to average over, shape ``(rows, positions)``. All of them if left out.

    Returns:
        A scalar; zero where the mask selects nothing.

    Raises:
        ValueError: If the shapes don't fit.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[0, 1, 1]])
        >>> logits = torch.zeros(1, 3, 2)  # a model that knows nothing of two tokens: ln 2
        >>> next_token_loss(logits[:, :-1], tokens[:, 1:])
        tensor(0.6931)
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} go with targets of shape {tuple(logits.shape[:-1])}; "
            f"got {tuple(targets.shape)}."
        )
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return _mean(losses.view_as(targets), mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)
